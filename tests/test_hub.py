"""scripts/download.py in this process, against a hub that is not always friendly."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from scripts import fetch
from tests.hub import SIZE, WEIGHTS, Cdn, Place, random_files


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return random_files(tmp_path_factory.mktemp("published"))


@pytest.fixture
def place(tmp_path, published, monkeypatch, capfd):
    place = Place(tmp_path, published, monkeypatch, capfd)
    yield place
    place.hub.close()


def test_a_second_run_reads_nothing_and_a_changed_file_is_read_and_fetched_again(place, monkeypatch):
    assert place.get()[0] == 0 and place.is_whole()
    assert place.transfers()[-1] == ("config.json", None)  # the last
    read = []
    real = fetch.hash_of
    monkeypatch.setattr(fetch, "hash_of", lambda path, file: read.append(path.name) or real(path, file))
    assert place.get("Qwen/Qwen3-0.6B")[0] == 0 and place.transfers() == [] and read == []
    # The same size and another time: read, found wrong, and while it comes config.json is away.
    (place.folder / WEIGHTS).write_bytes(b"x" * SIZE)
    place.hub.transfers.extend([(404, b"", {})])
    assert place.get()[0] == 1 and WEIGHTS in read and not (place.folder / "config.json").exists()
    place.transfers()
    assert place.get("--revision", "v1")[0] == 0 and place.is_whole()
    assert [name for name, _ in place.transfers()] == [WEIGHTS]
    # So it is with that of another revision.
    (place.folder / "config.json").write_bytes(b"{}")
    (place.folder / "tokenizer.json").unlink()
    place.hub.transfers.extend([(404, b"", {})])
    assert place.get()[0] == 1 and not (place.folder / "config.json").exists()
    assert place.get()[0] == 0 and place.is_whole()
    place.transfers()
    # A damaged record only costs time.
    (place.folder / fetch.RECORD).write_text('{"tokenizer.json": 3')
    read.clear()
    assert place.get()[0] == 0 and place.transfers() == [] and len(read) == 5


def test_what_passes_is_tried_again(place):
    place.hub.api.extend([(500, b"", {}), (429, b"", {"Retry-After": "0"}), (503, b"", {})])
    place.hub.transfers.extend([(status, b"", {}) for status in (500, 502, 503, 504, 429)])
    code, _, err = place.get()
    assert code == 0 and place.is_whole()
    assert "the hub answered 429; trying again" in err and err.count("trying again") == 8


def test_what_does_not_pass_has_an_end(place):
    place.hub.api.extend([(503, b"", {})] * 50)
    code, _, err = place.get()
    assert code == 1 and "the hub answered 503; tried 5 times" in err and "it goes on where it stopped" in err
    assert len(place.hub.api) == 45
    place.hub.api.clear()
    place.hub.transfers.extend([(503, b"", {})] * 500)
    code, _, err = place.get()
    assert code == 1 and "the hub answered 503; tried 5 times" in err and "it goes on where it stopped" in err
    assert not (place.folder / "config.json").exists()


def test_transfers_that_break_off_go_on(place):
    place.hub.break_after = 40_000  # more often than a file is tried without progress
    assert place.get()[0] == 0 and place.is_whole()
    assert (WEIGHTS, "bytes=280000-") in place.transfers()


def test_a_transfer_that_stands_still_goes_on(place):
    place.hub.stall_after = 200_000
    code, _, err = place.get()
    place.hub.go_on.set()
    assert code == 0 and place.is_whole() and (WEIGHTS, "bytes=200000-") in place.transfers()


@pytest.mark.parametrize("ranges", ["no", "wrong", "416"])
def test_servers_that_cannot_go_on_in_the_middle(place, ranges):
    place.hub.ranges = ranges
    place.part(place.bytes()[:100_000])
    assert place.get()[0] == 0 and place.is_whole()
    asked = [(WEIGHTS, "bytes=100000-")] + ([] if ranges == "no" else [(WEIGHTS, None)])  # an answer with all is used
    assert [each for each in place.transfers() if each[0] == WEIGHTS] == asked
    # Where it always breaks off too, there is an end.
    shutil.rmtree(place.folder)
    place.hub.break_after = 150_000
    place.transfers()
    code, _, err = place.get()
    assert code == 1 and "it goes on where it stopped" in err and len(place.transfers()) < 40


def test_parts_that_are_too_long_wrong_or_of_another_revision(place):
    place.part(b"y" * (SIZE + 1))
    other = place.folder / "model-1-of-2.safetensors.00000000.part"
    other.write_bytes(b"of another revision")
    code, _, err = place.get()
    assert code == 0 and place.is_whole() and not other.exists() and "damaged" not in err
    assert (WEIGHTS, None) in place.transfers()
    (place.folder / WEIGHTS).unlink()
    place.part(b"y" * 1000)  # wrong from its first byte on: seen at the end, fetched once more
    code, _, err = place.get()
    assert code == 0 and place.is_whole() and f"{WEIGHTS} came damaged and is fetched once more" in err
    assert place.transfers()[:2] == [(WEIGHTS, "bytes=1000-"), (WEIGHTS, None)]
    (place.folder / WEIGHTS).unlink()
    place.part(place.bytes())  # whole, and killed before it was renamed
    assert place.get()[0] == 0 and place.is_whole() and place.transfers() == []


def test_a_file_that_is_always_damaged(place):
    place.hub.damage = {WEIGHTS: 2}
    code, out, err = place.get()
    assert code == 1 and out == "" and f"Qwen3-0.6B/{WEIGHTS} came damaged twice" in err
    assert not (place.folder / WEIGHTS).exists() and not (place.folder / "config.json").exists()
    place.hub.damage = {WEIGHTS: 1}
    assert place.get()[0] == 0 and place.is_whole()


def test_a_server_that_sends_too_much_or_a_page_of_its_own(place):
    place.hub.extra = b"more"
    code, _, err = place.get()
    assert code == 1 and "more was sent than the" in err and not list(place.folder.glob("*.json"))
    place.hub.extra = b""
    part = place.part(place.bytes()[:100_000])
    place.hub.transfers.extend([(200, b"<html>log in</html>", {})] * 3)
    code, _, err = place.get()
    assert code == 0 and place.is_whole() and "19 bytes were sent for a file of " in err and not part.exists()


def test_the_token_goes_to_the_hub_alone_and_expired_addresses_are_asked_for_again(place, monkeypatch):
    place.hub.cdn = cdn = Cdn(place.hub)
    cdn.expired = 3
    place.hub.token = "secret"
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert place.get()[0] == 0 and place.is_whole()
    assert all(sent == "Bearer secret" for *_, sent in place.hub.log)
    assert len(cdn.log) == 8 and all(sent is None for *_, sent in cdn.log)
    cdn.close()


def test_wrong_tokens_and_terms(place, monkeypatch):
    place.hub.token = "secret"
    code, _, err = place.get()
    assert code == 1 and "HF_TOKEN does not allow it" in err and len(place.hub.log) == 1
    monkeypatch.setenv("HF_TOKEN", "wrong")
    code, _, err = place.get()
    assert code == 2 and "token (HF_TOKEN) is wrong or has expired; public checkpoints need none: unset it" in err
    assert len(place.hub.log) == 2
    monkeypatch.setenv("HF_TOKEN", "wröng")
    code, _, err = place.get()
    assert code == 2 and "HF_TOKEN has characters" in err
    monkeypatch.setenv("HF_TOKEN", "secret")
    place.hub.transfers.extend([(403, b"", {"X-Error-Code": "GatedRepo"})] * 9)
    code, _, err = place.get()
    assert code == 2 and "wants you to accept its terms" in err
    code, _, err = place.get("--revision", "v9")
    assert code == 2 and "has no revision v9" in err


def test_addresses_and_networks(place, monkeypatch):
    for endpoint, code, text in [
            ("127.0.0.1:8811", 2, "HF_ENDPOINT is '127.0.0.1:8811', expected an address that begins with https://"),
            ("http://127.0.0.1:x", 2, "which is no address"),
            ("http://127.0.0.1:9", 1, "no connection")]:  # the discard port: nobody listens
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        got, out, err = place.get()
        assert got == code and out == "" and text in err
    assert "cannot get Qwen/Qwen3-0.6B from http://127.0.0.1:9" in err and err.count("\n") == 3
    monkeypatch.setattr(constants, "ENDPOINT", place.hub.url)
    place.hub.api.extend([(200, b"<html>log in</html>", {})] * 9)
    code, _, err = place.get()
    assert code == 1 and "is it a network to log in to?" in err and len(place.hub.api) == 6
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (place.cache / "models--Qwen--Qwen3-0.6B/snapshots/1").mkdir(parents=True)
    (place.cache / "models--Qwen--Qwen3-0.6B/snapshots/1/config.json").touch()
    code, _, err = place.get()
    assert code == 2 and "HF_HUB_OFFLINE" in err and "uv run python -m qwen3.main -m Qwen/Qwen3-0.6B" in err
