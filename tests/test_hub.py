"""scripts/download.py in this process, against a hub that is not always friendly; and what is typed."""

import errno
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from scripts import download, fetch, hub
from tests.hub import Cdn, Hub

WEIGHTS = "model-2-of-2.safetensors"
SIZE = 300_000


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """Names are what counts here: the bytes are random."""
    folder, made = tmp_path_factory.mktemp("published"), random.Random(1)
    for name in ("model-1-of-2.safetensors", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "config.json"):
        (folder / name).write_bytes(made.randbytes(SIZE if name.endswith("safetensors") else 2000))
    (folder / "README.md").write_text("not needed")
    return folder


class Place:
    def __init__(self, root: Path, published: Path, monkeypatch, capfd):
        self.hub, self.published, self.capfd = Hub(published, "Qwen/Qwen3-0.6B"), published, capfd
        self.folder, self.cache = root / "checkpoints/Qwen3-0.6B", root / "cache"
        for name, value in {"ENDPOINT": self.hub.url, "HF_HUB_CACHE": str(self.cache), "HF_TOKEN_PATH": str(root / "token"),
                            "HF_HUB_DOWNLOAD_TIMEOUT": 1, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(download, "CHECKPOINTS", root / "checkpoints")
        monkeypatch.setattr(hub, "WAITS", (0.01,) * 4)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)

    def get(self, *words: str, package: str = "qwen3") -> tuple[int, str, str]:
        code = download.main([package, *words])
        out, err = self.capfd.readouterr()
        assert all(len(line) < 300 for line in err.splitlines())
        return code, out, err

    def transfers(self) -> list[tuple[str, str | None]]:
        """(file, range) of every file that was asked for, and forget them."""
        asked = [(path.rpartition("/")[2], wanted) for _, path, wanted, _ in self.hub.log if "/resolve/" in path]
        self.hub.log.clear()
        return asked

    def is_whole(self) -> bool:
        return all((self.folder / path.name).read_bytes() == path.read_bytes() for path in self.published.iterdir()
                   if path.name != "README.md") and not list(self.folder.glob("*.part"))

    def part(self, data: bytes, name: str = WEIGHTS) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        (entry,) = [entry for entry in self.hub.files if entry["rfilename"] == name]
        (path := self.folder / f"{name}.{entry['blobId'][:8]}.part").write_bytes(data)
        return path

    def bytes(self, name: str = WEIGHTS) -> bytes:
        return (self.published / name).read_bytes()


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
    assert place.get("--revision", "v1")[0] == 0 and place.is_whole() and [name for name, _ in place.transfers()] == [WEIGHTS]
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
    assert code == 1 and "the hub answered 503; tried 5 times" in err and "it goes on where it stopped" in err and len(place.hub.api) == 45
    place.hub.api.clear()
    place.hub.transfers.extend([(503, b"", {})] * 500)
    code, _, err = place.get()
    assert code == 1 and "the hub answered 503; tried 5 times" in err and "it goes on where it stopped" in err
    assert not (place.folder / "config.json").exists()


def test_transfers_that_break_off_go_on(place):
    place.hub.break_after = 70_000
    assert place.get()[0] == 0 and place.is_whole()
    assert (WEIGHTS, "bytes=70000-") in place.transfers()


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
    assert place.get()[0] == 0 and place.is_whole() and not other.exists()
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
    assert code == 2 and "token (HF_TOKEN) is wrong or has expired; public checkpoints need none: unset it" in err and len(place.hub.log) == 2
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
    for endpoint, code, text in [("127.0.0.1:8811", 2, "HF_ENDPOINT is '127.0.0.1:8811', expected an address that begins with https://"),
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


def test_trouble_with_the_disk_is_called_so(place, monkeypatch):
    place.folder.parent.mkdir()
    place.folder.write_text("a file")
    code, _, err = place.get()
    assert code == 2 and "Qwen3-0.6B is a file, and the checkpoint's folder belongs there" in err
    place.folder.unlink()
    place.folder.symlink_to("nowhere")
    code, _, err = place.get()
    assert code == 2 and "is a link to what is not there" in err
    place.folder.unlink()
    for number, text in [(errno.ENOSPC, "No space left on device; make room, then run this again: it goes on"),
                         (errno.EROFS, "Read-only file system"), (errno.EACCES, "Permission denied")]:
        def fails(self, file, part, seen):
            raise OSError(number, os.strerror(number), str(part))
        with monkeypatch.context() as patch:
            patch.setattr(hub.Hub, "receive", fails)
            code, _, err = place.get()
        assert code == 2 and text in err and "network" not in err


def test_the_disk_is_asked_where_the_folder_lies_and_parts_count_as_there(place, monkeypatch, tmp_path):
    (real := tmp_path / "another disk").mkdir()
    place.folder.parent.mkdir()
    place.folder.symlink_to(real)
    asked = []

    def usage(path):
        asked.append(Path(path).resolve())
        return shutil._ntuple_diskusage(10 ** 9, 10 ** 9 - 400_000, 400_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    code, _, err = place.get()
    assert code == 2 and asked == [real] and re.search("Qwen3-0.6B needs 606.0 kB more, and the disk of .* has 400.0 kB free", err)
    place.part(place.bytes()[:250_000])
    code, _, err = place.get()
    assert code == 0 and place.is_whole() and "5 of 5 files to get, 356.0 kB" in err


@pytest.mark.parametrize("another_disk", [False, True])
def test_the_hugging_face_cache_is_used(place, monkeypatch, another_disk):
    cache = place.cache / "models--Qwen--Qwen3-0.6B"
    (cache / "blobs").mkdir(parents=True)
    for entry in place.hub.files:
        name = entry["rfilename"]
        if name != "tokenizer.json":
            data = place.bytes(name)
            damaged = data[:-1] + bytes([data[-1] ^ 1]) if name == "model-1-of-2.safetensors" else data
            (cache / "blobs" / entry.get("lfs", {"sha256": entry["blobId"]})["sha256"]).write_bytes(damaged)
    if another_disk:
        def refuse(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        monkeypatch.setattr(os, "link", refuse)
    code, _, err = place.get()
    assert code == 0 and place.is_whole() and "4 are in the Hugging Face cache" in err
    assert sorted(name for name, _ in place.transfers()) == ["model-1-of-2.safetensors", "tokenizer.json"]
    assert ((place.folder / WEIGHTS).stat().st_nlink == 2) == (not another_disk)


def test_only_the_tokenizer(place):
    code, out, err = place.get("--only-tokenizer")
    assert code == 0 and out == f"{place.folder}\n" and "memory" not in err
    assert sorted(os.listdir(place.folder)) == [fetch.RECORD, "tokenizer.json", "tokenizer_config.json"]
    assert place.get()[0] == 0 and place.is_whole()
    assert place.get("DeepSeek-R1", "--only-tokenizer", package="deepseek_v3")[0] == 1  # 689 GB were not asked about


@pytest.mark.parametrize("package,asked,text", [
    ("qwen3", "Qwen3-7B", "Qwen3-7B is not a published dense Qwen3; did you mean Qwen3-"),
    ("qwen3", "qwen3-30b-a3b", "get it with: bash scripts/download_qwen3_moe.sh Qwen3-30B-A3B"),
    ("qwen3", "Qwen3-30B-A3", "did you mean Qwen3-30B-A3B (bash scripts/download_qwen3_moe.sh)?"),
    ("qwen3", "DeepSeek-R1", "bash scripts/download_deepseek_v3.sh DeepSeek-R1"),
    ("deepseek_v3", "Moonlight", "did you mean Moonlight-16B-A3B?"),
    ("deepseek_v3", "deepseek-ai/Moonlight-16B-A3B", "moonshotai/Moonlight-16B-A3B is"),
    ("deepseek_v3", "DeepSeek-R1-Distill-Qwen-7B", "is not a published checkpoint of DeepSeek-V3's architecture; did you mean "),
    ("qwen3_moe", "x" * 500, "did you mean Qwen3-30B-A3B?"),
    ("deepseek_v3", "DeepSeek-V3", "DeepSeek-V3 has 688.6 GB; add --yes"),
    ("deepseek_v3", "moonshotai/Kimi-K2-Instruct", "has 1029.2 GB; add --yes"),
    ("qwen3", "--lst", "--help lists the flags"),
])
def test_names_that_are_not_meant(place, package, asked, text):
    try:
        code, out, err = place.get(asked, package=package)
    except SystemExit as end:
        code, (out, err) = end.code, place.capfd.readouterr()
    assert code == 2 and out == "" and text in err and err.count("\n") == 1 and place.hub.log == []


def test_names_that_are(place):
    assert place.get("qwen/qwen3-0.6b")[1] == f"uv run{_directory()} python -m qwen3.main -m Qwen3-0.6B\n" and place.is_whole()
    for package, name in [("qwen3", "Qwen3-8B"), ("qwen3", "deepseek-r1-0528-qwen3-8b"), ("deepseek_v3", "zai-org/GLM-4.7-Flash")]:
        code, _, err = place.get(name, package=package)  # known, and not on this hub
        published = download.find(package, name)
        assert code == 1 and f"{place.hub.url} has no {download.owner_of(published)}/{published}" in err
    assert download.owner_of("DeepSeek-R1-0528-Qwen3-8B") == "deepseek-ai"
    for package, count, line in [("qwen3", 22, r"Qwen3-0.6B +1.5 GB"), ("qwen3_moe", 17, r"Qwen3-30B-A3B +61.1 GB"),
                                 ("deepseek_v3", 13, r"DeepSeek-R1 +688.6 GB")]:
        code, out, _ = place.get("--list", package=package)
        assert code == 0 and len(out.splitlines()) == count and re.search(f"^{line}$", out, re.M)


def _directory() -> str:
    return "" if Path.cwd() == download.ROOT else f" --directory {download.ROOT}"


def test_progress_in_plain_lines(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(download.time, "monotonic", lambda: now[0])
    done = {"a": 0}
    progress = download.Progress(8_000_000_000, done)
    for second in range(61):
        now[0], done["a"] = float(second), second * 10_000_000
        progress.draw()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "150.0 MB of 8.00 GB, 1 %, 10.0 MB/s, 13 min 5 s left" and len(lines) == 4
    assert json.dumps(lines[-1]).startswith('"600.0 MB of 8.00 GB, 7 %')
