"""scripts/download.py in this process: disks, the Hugging Face cache, names, progress."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from scripts import download
from scripts.hub import client, fetch
from tests.hub import WEIGHTS, Place, random_files


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return random_files(tmp_path_factory.mktemp("published"))


@pytest.fixture
def place(tmp_path, published, monkeypatch, capfd):
    place = Place(tmp_path, published, monkeypatch, capfd)
    yield place
    place.hub.close()


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
            patch.setattr(client.Hub, "receive", fails)
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
    assert code == 2 and asked == [real]
    assert re.search("Qwen3-0.6B needs 606.0 kB more, and the disk of .* has 400.0 kB free", err)
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
    assert sorted(os.listdir(place.folder)) == [fetch.RECORD, "config.json", "tokenizer.json", "tokenizer_config.json"]
    place.hub.transfers.extend([(404, b"", {})])
    assert place.get()[0] == 1 and not (place.folder / "config.json").exists()
    place.part(place.bytes()[:1000])  # the weights have begun: config.json comes after them
    (place.folder / "tokenizer.json").unlink(missing_ok=True)
    assert place.get("--only-tokenizer")[0] == 0 and (place.folder / "tokenizer.json").exists()
    assert not (place.folder / "config.json").exists()
    assert place.get()[0] == 0 and place.is_whole()
    assert place.get("DeepSeek-R1", "--only-tokenizer", package="deepseek_v3")[0] == 1  # 689 GB were not asked about


@pytest.mark.parametrize("package,asked,text", [
    ("qwen3", "Qwen3-7B", "Qwen3-7B is not a published dense Qwen3; did you mean Qwen3-"),
    ("qwen3", "qwen3-30b-a3b", "get it with: bash scripts/download_qwen3_moe.sh Qwen3-30B-A3B"),
    ("qwen3", "Qwen3-30B-A3", "did you mean Qwen3-30B-A3B (bash scripts/download_qwen3_moe.sh)?"),
    ("qwen3", "DeepSeek-R1", "bash scripts/download_deepseek_v3.sh DeepSeek-R1"),
    ("deepseek_v3", "Moonlight", "did you mean Moonlight-16B-A3B?"),
    ("deepseek_v3", "deepseek-ai/Moonlight-16B-A3B", "moonshotai/Moonlight-16B-A3B is"),
    ("deepseek_v3", "DeepSeek-R1-Distill-Qwen-7B",
     "is not a published checkpoint of DeepSeek-V3's architecture; did you mean "),
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
    assert place.get("qwen/qwen3-0.6b")[1] == f"uv run{_directory()} python -m qwen3.main -m Qwen3-0.6B\n"
    assert place.is_whole()
    for package, name in [("qwen3", "Qwen3-8B"), ("qwen3", "deepseek-r1-0528-qwen3-8b"),
                          ("deepseek_v3", "zai-org/GLM-4.7-Flash")]:
        code, _, err = place.get(name, package=package)  # known, and not on this hub
        published = download.find(package, name)
        assert code == 1 and f"{place.hub.url} has no {download.owner_of(published)}/{published}" in err
    assert download.owner_of("DeepSeek-R1-0528-Qwen3-8B") == "deepseek-ai"
    for package, count, line in [("qwen3", 28, r"Qwen3-0.6B +1.5 GB"), ("qwen3_moe", 19, r"Qwen3-30B-A3B +61.1 GB"),
                                 ("deepseek_v3", 14, r"DeepSeek-R1 +688.6 GB")]:
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
    assert lines[-1].startswith('600.0 MB of 8.00 GB, 7 %')
