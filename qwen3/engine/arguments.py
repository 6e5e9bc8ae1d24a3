"""What the command line is given: flags, the folder of a checkpoint, and a question from a pipe."""

import argparse
import json
import os
import re
import select
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from .fields import DTYPES
from .processes import on_first
from .terminal import PACKAGE, is_terminal, note

MAX_NEW_TOKENS = 4096
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
ABOUT_EMBEDDED = (
    'a tiny model that explains about 420 words of language models and adds small numbers; '
    'ask "What is RoPE?", "Why do we need the KV cache?" or "What is 347 + 586?"')

BATCH = """A line of the file is an object of JSON: {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]},
and if wanted "id", "seed", "max_new_tokens", the sampling settings (temperature, top_k, …) and "metadata", which is
copied; or a text in quotes. A file named .txt has a prompt a line. Answers come in the same order, one object a line. A
run that was stopped or killed goes on with the same command."""
ALONE = {  # what does not go with --batch
    "prompt": "the prompts are in the file",
    "chat": "nobody is there to converse with",
    "compile": "the compiled step is for a single sequence",
    "speculative": "each row would accept its drafts at another place",
    "show_experts": "the picture is of one answer"}


class Parser(argparse.ArgumentParser):
    """A parser with the flags that all packages have; a wrong one gets a sentence."""

    def __init__(self, what: str, default: str, embedded: str, question: str):
        name = f"python -m {PACKAGE}.main"
        super().__init__(prog=name, description=f"Generate text with {what}.", allow_abbrev=False)
        add = self.add_argument
        add("-m", "--model", metavar="NAME_OR_FOLDER",
            help="a folder, a name under checkpoints/, or OWNER/NAME as on the Hugging Face hub, if it was downloaded; "
                 f"default {default} if downloaded, else {embedded}")
        add("-p", "--prompt",
            help='the question, or the text to continue for a Base checkpoint; "-" reads standard input, and so does a '
                 f'pipe without -p; default "{question}"')
        add("-n", "--max-new-tokens", type=int, metavar="N", help=f"end after N tokens; default {MAX_NEW_TOKENS}")
        for *flags, kind, letter, what in (
                ("-t", "--temperature", float, "T", "0 always takes the likeliest token"),
                ("-k", "--top-k", int, "K", "sample from the K likeliest, 0 from all"),
                ("--top-p", float, "P", "sample from the likeliest that reach P"),
                ("--min-p", float, "P", "sample from those at least P times as likely as the likeliest"),
                ("--repetition-penalty", float, "R", "above 1 makes tokens that were there less likely"),
                ("--presence-penalty", float, "A", "subtract A from the logits of tokens that the answer has")):
            add(*flags, type=kind, metavar=letter, help=f"{what}; default: the checkpoint's")
        thinking = self.add_mutually_exclusive_group()
        add_switch = thinking.add_argument
        add_switch("--thinking", action="store_true", default=None, help="reason before answering (the default)")
        add_switch("--no-thinking", action="store_false", dest="thinking", help="answer without reasoning")
        add("--system", metavar="TEXT", help="a system prompt")
        add("--chat", action="store_true", help="a conversation; in it, /help shows the commands")
        add("--chat-format", metavar="NAME",
            help="how a conversation is written, where the checkpoint's template is not known; "
                 '"plain" continues plain text')
        add("--seed", type=int, metavar="N", help="repeat the same random choices")
        add("-d", "--device", help="cpu, cuda, cuda:1, mps; default: the fastest that is there")
        step = self.add_mutually_exclusive_group().add_argument
        step("--plain", action="store_true",
             help="run the code of the lesson alone, without the faster parts of engine/")
        step("--compile", action="store_true",
             help="compile the decode step: half a minute of waiting once, then faster on a GPU")
        add("--dtype", choices=(*DTYPES, "fp8", "int4", "int8"),
            help="default: the checkpoint's own (quantised weights stay as they are, but FP8 is expanded on a CPU that "
                 "has room for it); fp8 keeps FP8; int4 and int8 round weights here")
        add = self.add_argument_group("a file of prompts", BATCH).add_argument
        add("--batch", metavar="FILE", help='answer all prompts of a file; "-" reads standard input')
        add("-o", "--output", metavar="FILE", help="where the answers go; default: standard output")
        add("--batch-size", type=int, metavar="N",
            help="answer N prompts at a time; default 16, on a GPU 64, or as many as memory has room for")
        add("--data-parallel", type=int, metavar="N",
            help="N replicas of the model share the prompts, on GPUs one each")
        add("--restart", action="store_true", help="forget the answers of an earlier run to the same file")

    def parse_args(self, *arguments, **more) -> argparse.Namespace:
        """The flags; those that go only with --batch, or not with it, are refused in one sentence."""
        given = super().parse_args(*arguments, **more)
        if given.batch is None:
            for name in ("output", "batch_size", "data_parallel", "restart"):
                if getattr(given, name):
                    self.error(f"--{name.replace('_', '-')} goes with --batch FILE")
        for name, why in ALONE.items() if given.batch is not None else ():
            if getattr(given, name, None):
                self.error(f"--{name.replace('_', '-')} does not go with --batch: {why}")
        for name in ("batch_size", "data_parallel"):
            if (number := getattr(given, name)) is not None and number < 1:
                self.error(f"--{name.replace('_', '-')} is {number}, expected 1 or more")
        return given

    def error(self, message: str) -> NoReturn:
        message = message if len(message) < 240 else f"{message[:240]}…"
        note(f"{PACKAGE}: {message}; --help lists the flags")
        sys.exit(2)


def find_question(arguments: argparse.Namespace) -> str | None:
    """The question of -p or of a pipe; None where the program has to ask one itself. ValueError if it is empty."""
    if arguments.chat:
        if arguments.prompt is not None:
            raise ValueError("--chat asks for its questions itself; leave out -p")
        return None
    if arguments.prompt not in (None, "-"):
        return arguments.prompt
    text = on_first(lambda: read_standard_input(wanted=arguments.prompt == "-"))
    if arguments.prompt is None and not text:  # nothing at all was written, as in many a CI
        return None
    if not text or not text.strip():
        raise ValueError("standard input holds no question; write one there, or ask it with -p")
    return text.rstrip("\r\n")


def read_standard_input(wanted: bool) -> str | None:
    """All of it as text; None where nothing can come from there. A terminal or a device is read only if wanted."""
    stream = sys.stdin
    try:
        if stream is None or (is_terminal(stream) and not wanted):
            return None
        number = None
        with suppress(OSError, ValueError, AttributeError):  # a program's own stream has no number
            number = stream.fileno()
        if number is not None:
            mode = os.fstat(number).st_mode
            if stat.S_ISCHR(mode) and not wanted:  # /dev/null
                return None
            if os.name != "nt" and (is_terminal(stream) or not select.select([number], [], [], 1)[0]):
                note("reading a question from standard input, up to its end (Ctrl-D); -p asks one on the command line")
        text = stream.buffer.read() if hasattr(stream, "buffer") else stream.read()
        if isinstance(text, bytes):
            text = text.decode(getattr(stream, "encoding", None) or "utf-8", "surrogateescape")
        return text.removeprefix("\ufeff")
    except (OSError, ValueError):
        return None


# The folder of a checkpoint

def find_checkpoint(name: str | None, checkpoints: Path, default: str, embedded: str,
                    download: str) -> tuple[Path, list[str]]:
    """(The folder of a name or path; notes.) Without a name the published default, else the embedded checkpoint."""
    if name is None:
        if is_whole(checkpoints / default):
            return checkpoints / default, []
        begun = any((checkpoints / default).glob("*"))
        why = (f"the download of {default} is not finished (`{download}` goes on)" if begun else
               f"{default} is not downloaded (`{download}` gets it)")
        return checkpoints / embedded, [f"{why}: using {embedded}, {ABOUT_EMBEDDED}"]
    short = name if len(name) <= 80 else f"{name[:38]}…{name[-40:]}"
    try:
        with suppress(RuntimeError):  # "~" where no home is known
            name = str(Path(name).expanduser())
        is_published = re.fullmatch(r"[\w.-]+/[\w.-]+", name)  # OWNER/NAME
        own = checkpoints / (Path(name).name if is_published else name)
        cached = [cache / f"models--{name.replace('/', '--')}" for cache in hub_caches() if is_published]
        for folder in (Path(name), checkpoints / name, own, *cached):
            if folder.is_dir():
                folder = snapshot(folder).resolve()
                if any(folder.glob("*.part")) and not is_whole(folder, parts=True):
                    raise ValueError(f"{short}: its download is not finished; `{download} {folder.name}` goes on")
                is_embedded = folder == (checkpoints / embedded).resolve()
                return folder, [f"{embedded} is {ABOUT_EMBEDDED}"] if is_embedded else []
        if Path(name).is_file():
            if name.lower().endswith(".gguf"):
                raise ValueError(f"{short} is a GGUF file, and this project reads safetensors; get the checkpoint that "
                                 "it was made from")
            raise ValueError(f"{short} is a file, and a checkpoint is a folder: {Path(name).resolve().parent}?")
    except OSError as error:  # a name that no file can have
        raise ValueError(f"{short}: {error.strerror}") from None
    there = sorted(path.parent.name for path in checkpoints.glob("*/config.json"))
    listed = ", ".join(there[:3]) + (", …" if there[3:] else "") or "none"
    raise FileNotFoundError(f"{short}: neither a folder nor a checkpoint (there: {listed}); get a published one with "
                            f"`{download} NAME`, `{download} --list` names them")


def is_whole(folder: Path, parts: bool = False) -> bool:
    """Whether config.json and all weights are there and, unless `parts`, no file whose download is not finished."""
    files = {path.name for path in folder.glob("*.safetensors")}
    with suppress(OSError, ValueError, AttributeError, TypeError):  # a damaged index has its own sentence, later
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = files and files.issuperset(index["weight_map"].values())
    return (folder / "config.json").is_file() and bool(files) and (parts or not any(folder.rglob("*.part")))


def hub_caches() -> list[Path]:
    """Where the Hugging Face libraries keep what they download, by their variables."""
    where = [os.environ.get("HF_HUB_CACHE"), os.environ.get("HUGGINGFACE_HUB_CACHE")]
    for variable, below in (("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")):
        if home := os.environ.get(variable):
            where.append(f"{home}/{below}")
    with suppress(RuntimeError):
        return [Path(folder).expanduser() for folder in (*where, "~/.cache/huggingface/hub") if folder]
    return [Path(folder) for folder in where if folder]


def snapshot(folder: Path) -> Path:
    """The checkpoint in a folder models--OWNER--NAME of the Hugging Face cache; any other folder is one itself."""
    there = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    if not there or (folder / "config.json").exists():
        return folder
    with suppress(OSError, ValueError):
        commit = (folder / "refs/main").read_text().strip()
        there = [path for path in there if path.name == commit] or there
    return max(there, key=lambda path: path.stat().st_mtime)


def name_of(folder: Path) -> str:
    """The checkpoint's name, in the Hugging Face cache too, where the folder is called by its commit."""
    return folder.parents[1].name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name
