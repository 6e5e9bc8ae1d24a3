#!/usr/bin/env bash
# Gets a published Qwen3-MoE checkpoint into checkpoints/: bash scripts/download_qwen3_moe.sh [NAME] [--yes] [--revision R] [--list]
# HF_ENDPOINT chooses another hub, HF_TOKEN is sent along. Run it again after an interruption: it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv >/dev/null || { echo "download: uv is missing; get it with 'pip install uv'" >&2; exit 2; }
exec uv run --quiet python - "$@" <<'PYTHON'
import argparse
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

PACKAGE, DEFAULT, KIND = "qwen3_moe", "Qwen3-30B-A3B", "Qwen3-MoE"
OWNERS = {"Qwen3": "Qwen"}  # by the first part of the name
GIGABYTES = {  # about; the hub says exactly
    "Qwen3-30B-A3B": 61.1, "Qwen3-235B-A22B": 470.2, "Qwen3-30B-A3B-Base": 61.1,
    "Qwen3-30B-A3B-Instruct-2507": 61.1, "Qwen3-30B-A3B-Thinking-2507": 61.1,
    "Qwen3-235B-A22B-Instruct-2507": 470.2, "Qwen3-235B-A22B-Thinking-2507": 470.2,
    "Qwen3-Coder-30B-A3B-Instruct": 61.1, "Qwen3-Coder-480B-A35B-Instruct": 960.3,
    "Qwen3-30B-A3B-FP8": 31.2, "Qwen3-235B-A22B-FP8": 236.4, "Qwen3-30B-A3B-Instruct-2507-FP8": 31.2,
    "Qwen3-30B-A3B-Thinking-2507-FP8": 31.2, "Qwen3-235B-A22B-Instruct-2507-FP8": 236.4,
    "Qwen3-235B-A22B-Thinking-2507-FP8": 236.4, "Qwen3-Coder-30B-A3B-Instruct-FP8": 31.2,
    "Qwen3-Coder-480B-A35B-Instruct-FP8": 482.2,
}
NEEDED = re.compile(r"(config|generation_config|tokenizer|tokenizer_config|model\.safetensors\.index)\.json"
                    r"|chat_template\.jinja|tiktoken\.model|[^/]+\.safetensors")
LARGE = 200  # gigabytes, of which one asks first


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(code: int, text: str) -> None:
    """2: the user can mend it; 1: the network or the hub."""
    note(f"download: {text}")
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        fail(2, f"{message}; --help lists the flags")


def choose() -> argparse.Namespace:
    parser = Parser(prog="bash scripts/download_qwen3_moe.sh", description="Get a published checkpoint.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", default=DEFAULT, help=f"default {DEFAULT}")
    parser.add_argument("--revision", help="a branch, tag or commit of the checkpoint")
    parser.add_argument("--yes", action="store_true", help=f"get it though it has more than {LARGE} GB")
    parser.add_argument("--list", action="store_true", help="print the names and sizes, and get nothing")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:28} {size:5.1f} GB" for name, size in GIGABYTES.items()), flush=True)
        sys.exit(0)
    owner, _, name = arguments.name.rpartition("/")
    if name not in GIGABYTES or owner not in ("", owner_of(name)):
        fail(2, f"{arguments.name} is not a published {KIND}; there are {', '.join(GIGABYTES)}")
    if GIGABYTES[name] > LARGE and not arguments.yes:
        fail(2, f"{name} has {GIGABYTES[name]} GB; add --yes if you have the disk and the time for it")
    arguments.name = name
    return arguments


def owner_of(name: str) -> str:
    return OWNERS[name.partition("-")[0]]


def is_whole(path: Path, file) -> bool:
    """Size and hash as the hub says: SHA-256 for large files, git's own SHA-1 for small ones."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(f"blob {file.size}\0".encode())
    with path.open("rb") as opened:
        while piece := opened.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest() == (file.lfs.sha256 if file.lfs else file.blob_id)


def fetch(url: str, path: Path, file) -> None:
    """Get one file, going on where an earlier run stopped.

    By http_get, since hf_hub_download begins each file anew in each run, and a file can be 5 GB.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = path.with_name(f"{path.name}.{file.blob_id[:8]}.part")  # another revision has another name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    part.touch()
    with part.open("r+b") as opened:
        http_get(url, opened, resume_size=opened.seek(0, 2), headers=build_hf_headers(), expected_size=file.size,
                 displayed_filename=path.name)
    if not is_whole(part, file):
        part.unlink()
        fail(1, f"{path} came damaged (its size or hash is not what the hub says) and was deleted; run this again")
    part.replace(path)


def download(name: str, revision: str | None) -> None:
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.errors import (EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError,
                                        RevisionNotFoundError)

    repository, folder = f"{owner_of(name)}/{name}", Path("checkpoints") / name
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        files = sorted((file for file in info.siblings if NEEDED.fullmatch(file.rfilename)), key=lambda file: file.size)
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            fail(1, f"{repository} has no safetensors at {constants.ENDPOINT}")
        missing = []
        for file in files:
            if (folder / file.rfilename).is_file():
                note(f"checking {file.rfilename}, which is there")
            if not is_whole(folder / file.rfilename, file):
                missing.append(file)
        wanted, free = sum(file.size for file in missing), shutil.disk_usage(".").free
        if wanted > free:
            fail(2, f"{name} needs {wanted / 1e9:.1f} GB more, the disk has {free / 1e9:.1f} GB free")
        note(f"{repository} at {info.sha[:12]}: {len(missing)} of {len(files)} files to get, {wanted / 1e9:.2f} GB")
        for file in missing:
            fetch(hf_hub_url(repository, file.rfilename, revision=info.sha), folder / file.rfilename, file)
    except GatedRepoError:
        fail(2, f"{repository} wants you to accept its terms; do so on its page and set HF_TOKEN")
    except RevisionNotFoundError:
        fail(2, f"{repository} has no revision {revision}")
    except (RepositoryNotFoundError, EntryNotFoundError):
        fail(1, f"{constants.ENDPOINT} has no {repository}, or HF_TOKEN does not allow it")
    except HfHubHTTPError as error:
        fail(1, f"{constants.ENDPOINT} answered {error.response.status_code} for {repository}; try again later")
    except SystemExit:
        raise
    except Exception as error:  # by version of the library, no network is one of many types
        fail(1, f"cannot get {repository} from {constants.ENDPOINT} ({type(error).__name__}); check the network, then "
                "run this again: it goes on where it stopped")
    note(f"{folder} is whole. Run it with:")
    print(f"uv run python -m {PACKAGE}.main -m {name}")


if __name__ == "__main__":
    try:
        arguments = choose()
        download(arguments.name, arguments.revision)
    except BrokenPipeError:  # whoever reads has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        note("\ndownload: stopped; run this again and it goes on")
        sys.exit(130)
PYTHON
