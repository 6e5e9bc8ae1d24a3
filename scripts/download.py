"""Download a published checkpoint into checkpoints/: bash scripts/download_PACKAGE.sh [NAME].

Also `python -m scripts.download PACKAGE [NAME]`; --help lists the flags. The requests are in hub/.
HF_ENDPOINT chooses another hub, HF_TOKEN is sent along. After an interruption, run it again: it goes on.
"""

import argparse
import difflib
import errno
import os
import re
import shlex
import shutil
import sys
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "checkpoints"
OWNERS = {"Qwen3": "Qwen", "DeepSeek": "deepseek-ai", "Moonlight": "moonshotai", "Kimi": "moonshotai", "GLM": "zai-org"}
KINDS = {"qwen3": "dense Qwen3", "qwen3_moe": "Qwen3-MoE", "deepseek_v3": "checkpoint of DeepSeek-V3's architecture"}
GIGABYTES = {  # rounded; the hub gives the exact size. The first name of each package is the default.
    "qwen3": {
        "Qwen3-0.6B": 1.5, "Qwen3-1.7B": 4.1, "Qwen3-4B": 8.0, "Qwen3-8B": 16.4, "Qwen3-14B": 29.5, "Qwen3-32B": 65.5,
        "Qwen3-0.6B-Base": 1.2, "Qwen3-1.7B-Base": 3.4, "Qwen3-4B-Base": 8.0, "Qwen3-8B-Base": 16.4,
        "Qwen3-14B-Base": 29.5, "Qwen3-4B-Instruct-2507": 8.0, "Qwen3-4B-Thinking-2507": 8.0,
        "DeepSeek-R1-0528-Qwen3-8B": 16.4,
        "Qwen3-0.6B-FP8": 0.8, "Qwen3-1.7B-FP8": 2.0, "Qwen3-4B-FP8": 4.4, "Qwen3-8B-FP8": 9.4, "Qwen3-14B-FP8": 16.3,
        "Qwen3-32B-FP8": 34.3, "Qwen3-4B-Instruct-2507-FP8": 4.4, "Qwen3-4B-Thinking-2507-FP8": 4.4,
        "Qwen3-0.6B-GPTQ-Int8": 0.8, "Qwen3-1.7B-GPTQ-Int8": 2.1, "Qwen3-4B-AWQ": 2.7, "Qwen3-8B-AWQ": 6.1,
        "Qwen3-14B-AWQ": 10.0, "Qwen3-32B-AWQ": 19.3},
    "qwen3_moe": {
        "Qwen3-30B-A3B": 61.1, "Qwen3-235B-A22B": 470.2, "Qwen3-30B-A3B-Base": 61.1,
        "Qwen3-30B-A3B-Instruct-2507": 61.1, "Qwen3-30B-A3B-Thinking-2507": 61.1,
        "Qwen3-235B-A22B-Instruct-2507": 470.2, "Qwen3-235B-A22B-Thinking-2507": 470.2,
        "Qwen3-Coder-30B-A3B-Instruct": 61.1, "Qwen3-Coder-480B-A35B-Instruct": 960.3,
        "Qwen3-30B-A3B-FP8": 31.2, "Qwen3-235B-A22B-FP8": 236.4, "Qwen3-30B-A3B-Instruct-2507-FP8": 31.2,
        "Qwen3-30B-A3B-Thinking-2507-FP8": 31.2, "Qwen3-235B-A22B-Instruct-2507-FP8": 236.4,
        "Qwen3-235B-A22B-Thinking-2507-FP8": 236.4, "Qwen3-Coder-30B-A3B-Instruct-FP8": 31.2,
        "Qwen3-Coder-480B-A35B-Instruct-FP8": 482.2,
        "Qwen3-30B-A3B-GPTQ-Int4": 16.9, "Qwen3-235B-A22B-GPTQ-Int4": 124.5},
    "deepseek_v3": {
        "Moonlight-16B-A3B-Instruct": 31.9, "Moonlight-16B-A3B": 31.9, "GLM-4.7-Flash": 62.4,
        "DeepSeek-V3": 688.6, "DeepSeek-V3-Base": 688.6, "DeepSeek-V3-0324": 688.6, "DeepSeek-V3.1": 688.6,
        "DeepSeek-V3.1-Base": 688.6, "DeepSeek-R1": 688.6, "DeepSeek-R1-0528": 688.6,
        "Kimi-K2-Instruct": 1029.2, "Kimi-K2-Base": 1029.2, "Kimi-K2-Instruct-0905": 1029.2,
        "Kimi-K2-Thinking": 594.2},
}
TOKENIZER = re.compile(r"(tokenizer|tokenizer_config|config)\.json|chat_template\.jinja|tiktoken\.model")
NEEDED = re.compile(TOKENIZER.pattern + r"|(generation_config|model\.safetensors\.index)\.json|[^/\\]+\.safetensors")
LARGE = 200  # gigabytes; above, --yes is required


def note(text: str) -> None:
    try:
        if sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass  # the terminal has been closed; the download goes on


def in_units(size: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.{2 if size < 10 * factor else 1}f} {unit}"
    return f"{size:.0f} bytes"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, with exit code 2."""

    def error(self, message: str) -> None:
        note(f"download: {message[:200]}; --help lists the flags")
        sys.exit(2)


def parse(words: list[str]) -> argparse.Namespace:
    package = words[0] if words and words[0] in KINDS else None
    program = f"bash scripts/download_{package}.sh" if package else "python -m scripts.download"
    parser = Parser(prog=program, description="Download a published checkpoint.", allow_abbrev=False)
    if package is None:
        parser.add_argument("package", choices=KINDS)
    default = f"; default {next(iter(GIGABYTES[package]))}" if package else ""
    parser.add_argument("name", nargs="?", help=f"NAME or OWNER/NAME{default}")
    parser.add_argument("--revision", help="a branch, tag or commit of the checkpoint")
    parser.add_argument("--only-tokenizer", action="store_true", help="a few MB: the tokenizer without the weights")
    parser.add_argument("--yes", action="store_true", help=f"download it even if it has more than {LARGE} GB")
    parser.add_argument("--list", action="store_true", help="print the names and sizes, download nothing")
    arguments = parser.parse_args(words[1:] if package else words)
    arguments.package = package or arguments.package
    return arguments


def find(package: str, asked: str) -> str:
    """The published name; Failure, with the name that is probably meant, if there is none."""
    from .hub.client import Failure
    owner, _, name = asked.rpartition("/")
    known = {each.lower(): (each, home) for home in GIGABYTES for each in GIGABYTES[home]}
    found, home = known.get(name.lower(), ("", ""))
    if home == package and owner.lower() in ("", owner_of(found).lower()):
        return found
    if home and owner.lower() not in ("", owner_of(found).lower()):
        raise Failure(2, f"{asked[:80]} is not known here; {owner_of(found)}/{found} is")
    if home:
        raise Failure(2, f"{found} is not a published {KINDS[package]}; get it with: "
                         f"bash scripts/download_{home}.sh {found}")
    near = difflib.get_close_matches(name.lower(), [each for each in known if known[each][1] == package], 1, 0.5)
    far = difflib.get_close_matches(name.lower(), known, 1, 0.85)
    meant, home = known[(far or near or [next(iter(GIGABYTES[package])).lower()])[0]]
    where = "" if home == package else f" (bash scripts/download_{home}.sh)"
    raise Failure(2, f"{asked[:80]} is not a published {KINDS[package]}; did you mean {meant}{where}? --list names all")


def owner_of(name: str) -> str:
    return OWNERS[name.partition("-")[0]]


def memory_note(package: str, gigabytes: float) -> str:
    """The memory that running it takes, to be told before the download."""
    try:
        own = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        own = 0
    machine = f"; this machine has {in_units(own)}" if own > 0 else ""
    if package == "qwen3":
        return f"running it takes about {gigabytes} GB of memory{machine}"
    return (f"running it takes about {gigabytes} GB of memory on a GPU; on a CPU less will do, the rest is then read "
            f"from the disk, slowly{machine}")


class Progress:
    """One line for all files: rewritten on a terminal, otherwise a new one every 15 seconds."""

    def __init__(self, total: int, done: dict[str, int]):
        self.total, self.done, self.width = total, done, 0
        self.live = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.seen, self.last = deque([(time.monotonic(), sum(done.values()))]), time.monotonic()

    def text(self) -> str:
        (since, before), (now, bytes_now) = self.seen[0], self.seen[-1]
        rate = max(bytes_now - before, 0) / max(now - since, 1e-3)
        text = f"{in_units(bytes_now)} of {in_units(self.total)}, {100 * bytes_now // max(self.total, 1)} %"
        if rate >= 1:
            left = round((self.total - bytes_now) / rate)
            hours, minutes = divmod(left // 60, 60)
            words = f"{hours} h {minutes} min" if hours else f"{minutes} min {left % 60} s" if minutes else f"{left} s"
            text += f", {in_units(rate)}/s, {words} left"
        return text

    def draw(self) -> None:
        """Show how far it is: five times a second in a terminal, else a line every 15 seconds."""
        now = time.monotonic()
        if now - self.last < (0.2 if self.live else 15):
            return
        self.last = now
        self.seen.append((now, sum(tuple(self.done.values()))))
        while len(self.seen) > 2 and now - self.seen[0][0] > 15:
            self.seen.popleft()
        if not self.live:
            return note(self.text())
        text = self.text()[:max(shutil.get_terminal_size().columns - 1, 1)]
        self.write("\r" + text.ljust(self.width))
        self.width = len(text)

    def note(self, text: str) -> None:
        self.clear()
        note(text)

    def clear(self) -> None:
        if self.width:
            self.write("\r" + " " * self.width + "\r")
            self.width = 0

    def write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):
            self.live = False


def download(package: str, name: str, revision: str | None, only_tokenizer: bool) -> None:
    """Fetch what is missing of a checkpoint into its folder. Raises Failure with an exit code and a sentence."""
    from huggingface_hub import constants

    from .hub import fetch
    from .hub.client import Failure, Hub, cache_of

    repository, folder = f"{owner_of(name)}/{name}", CHECKPOINTS / name
    if constants.HF_HUB_OFFLINE:
        raise Failure(2, "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is downloaded; unset it"
                      + hint(cache_of(repository), package, repository))
    there = Hub(repository, note)
    wanted = TOKENIZER if only_tokenizer else NEEDED
    try:
        files = there.files(revision, wanted)
    except Failure as failure:
        raise Failure(failure.code, f"{failure}{hint(cache_of(repository), package, repository)}") from None
    if not only_tokenizer and not any(file.name.endswith(".safetensors") for file in files):
        raise Failure(1, f"{repository} has no safetensors at {there.endpoint[:80]}")
    if folder.exists() and not folder.is_dir() or folder.is_symlink() and not folder.exists():
        what = "a link to what is not there" if folder.is_symlink() else "a file"
        raise Failure(2, f"{folder} is {what}, and the checkpoint's folder belongs there; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    with fetch.alone(folder) as alone:
        if not alone:
            raise Failure(2, f"{name} is being downloaded already, by another process; wait for it or stop it")
        get(there, folder, files, wanted, package, name)


def hint(cache: Path, package: str, repository: str) -> str:
    if not any(cache.glob("snapshots/*/config.json")):
        return ""
    return f" (in the Hugging Face cache it is there: uv run python -m {package}.main -m {repository})"


def get(there, folder: Path, files: list, wanted: re.Pattern, package: str, name: str) -> None:
    """Download `files` into `folder`, config.json last: an unfinished checkpoint must not look complete."""
    from .hub import fetch
    from .hub.client import Failure

    verified, missing = fetch.Verified(folder), []
    if wanted is TOKENIZER and any(folder.glob("*.safetensors*")):
        files = [file for file in files if file.name != "config.json"]  # after the weights, which are coming
    for file in files:
        if (folder / file.name).is_file() and not verified.is_known(file):
            note(f"checking {file.name}, which is there")
        if not verified.is_whole(file):
            missing.append(file)
    last = [file for file in files if file.name == "config.json"]
    if missing and last:
        if last[0] in missing:  # perhaps of another revision
            (folder / "config.json").unlink(missing_ok=True)
        else:
            (folder / "config.json").replace(folder / last[0].part)
            missing += last
    job = fetch.Fetch(there, folder, verified, missing)
    free = shutil.disk_usage(folder).free  # of the disk where the folder really is, if it is a link
    if job.needed > free + job.replaced:
        raise Failure(2, f"{name} needs {in_units(job.needed)} more, and the disk of {folder} has {in_units(free)} "
                         "free")
    note(f"{there.repository} at {there.commit[:12]}: {len(missing)} of {len(files)} files to get, "
         + in_units(job.to_come) + (f"; {len(job.cached)} are in the Hugging Face cache" if job.cached else ""))
    if job.to_come and wanted is NEEDED:
        note(memory_note(package, GIGABYTES[package][name]))
    progress = Progress(sum(file.size for file in missing), job.done)
    there.note = progress.note
    try:
        job.all([file for file in missing if file not in last], progress.draw)
        job.all([file for file in missing if file in last], progress.draw)
    finally:
        progress.clear()
    for part in folder.glob("*.part"):  # of another revision
        if (match := fetch.PART.fullmatch(part.name)) and wanted.fullmatch(match[1]):
            part.unlink()


def run(arguments: argparse.Namespace) -> None:
    """What the command line asks for. Raises Failure."""
    from .hub.client import Failure
    package, sizes = arguments.package, GIGABYTES[arguments.package]
    if arguments.list:
        return print("\n".join(f"{name:28} {size:5.1f} GB" for name, size in sizes.items()), flush=True)
    name = find(package, arguments.name or next(iter(sizes)))
    if sizes[name] > LARGE and not (arguments.yes or arguments.only_tokenizer):
        raise Failure(2, f"{name} has {sizes[name]} GB; add --yes if you have the disk and the time for it")
    download(package, name, arguments.revision, arguments.only_tokenizer)
    if arguments.only_tokenizer:
        note("the tokenizer is whole, the weights were not asked for. It is in:")
        return print(CHECKPOINTS / name, flush=True)
    note(f"{CHECKPOINTS / name} is whole. Run it with:")
    where = "" if Path.cwd() == ROOT else f" --directory {shlex.quote(str(ROOT))}"
    print(f"uv run{where} python -m {package}.main -m {name}", flush=True)


def main(words: list[str]) -> int:
    try:
        run(parse(words))
        return 0
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        note("\ndownload: stopped; run this again and it goes on")
        return 130
    except OSError as error:  # the network's errors are of other types
        what = error.strerror or type(error).__name__
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        cure = "make room, then run this again: it goes on" if full else "see to it, then run this again"
        note(f"download: cannot write {str(error.filename or CHECKPOINTS)[-120:]}: {what}; {cure}")
        return 2
    except Exception as error:
        text = str(error) if hasattr(error, "code") else f"{type(error).__name__}: {str(error)[:200]}"
        note(f"download: {text}")
        return getattr(error, "code", 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
