"""7. The command line: python -m deepseek_v3.main -p "What is MLA?"

The answer goes to standard output and nothing else does; what the model thinks, notes, progress and speed go
to standard error. Exit code 0, 2 for a user's mistake (one sentence says which), 130 after Ctrl-C.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, takewhile
from pathlib import Path

if __name__ == "__main__":  # importing torch takes seconds, and Ctrl-C should leave quietly then too
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch

from .config import DTYPES, Config
from .engine.safetensors_reader import CheckpointFiles
from .generate import check_request, generate, new_cache
from .layers import KVCache
from .model import Model
from .routing import Routing
from .speculative import Acceptance
from .tokenizer import END_THINK, THINK, Tokenizer, dropping_newlines
from .weights import bytes_per_token, check_memory, compute_dtype, find_device, gigabytes, load_model

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
DEFAULT, EMBEDDED, DOWNLOAD = "Moonlight-16B-A3B-Instruct", "DeepSeek-V3-Tiny", "bash scripts/download_deepseek_v3.sh"
DEFAULT_PROMPT, MAX_NEW_TOKENS = "What is MLA?", 4096
COMMANDS = "/clear forgets the conversation, /system TEXT sets the system prompt, /think, /no_think, /exit"


def note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def progress(what: str, done: int, total: int) -> None:
    """A line that overwrites itself and disappears at the end; only where somebody looks at it."""
    if sys.stderr.isatty():
        note(f"\r{what} {done:,}/{total:,}" if done < total else "\r\033[K", end="")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        note(f"deepseek_v3: {message}; --help lists the flags")
        sys.exit(2)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m deepseek_v3.main", description="Generate text with a DeepSeek-V3 checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("-m", "--model", metavar="NAME_OR_FOLDER", help=f"a name under checkpoints/ or a folder; default {DEFAULT}, else {EMBEDDED}")
    add("-p", "--prompt", help=f'the question, or the text to continue for a Base checkpoint; default "{DEFAULT_PROMPT}"')
    add("-n", "--max-new-tokens", type=int, metavar="N", help=f"end after N tokens; default {MAX_NEW_TOKENS}")
    add("-t", "--temperature", type=float, metavar="T", help="0 always takes the likeliest token; default: the checkpoint's")
    add("-k", "--top-k", type=int, metavar="K", help="sample from the K likeliest, 0 from all; default: the checkpoint's")
    add("--top-p", type=float, metavar="P", help="sample from the likeliest that reach P; default: the checkpoint's")
    thinking = parser.add_mutually_exclusive_group()
    thinking.add_argument("--thinking", action="store_true", default=None, help="reason before answering (the default)")
    thinking.add_argument("--no-thinking", action="store_false", dest="thinking", help="answer at once")
    add("--system", metavar="TEXT", help="a system prompt")
    add("--chat", action="store_true", help=f"a conversation; in it, {COMMANDS}")
    add("--speculative", action="store_true", help="the same text in fewer steps, where the checkpoint can draft tokens")
    add("--show-experts", action="store_true", help="at the end, a picture of which experts worked")
    add("--seed", type=int, metavar="N", help="repeat the same random choices")
    add("-d", "--device", help="cpu, cuda, cuda:1, mps; default: the fastest that is there")
    add("--compile", action="store_true", help="compile the decode step: half a minute of waiting once, then faster on a GPU")
    add("--dtype", choices=DTYPES, help="default: the checkpoint's own (FP8 weights stay FP8)")
    return parser.parse_args(arguments)


def find_checkpoint(name: str | None) -> Path:
    """The folder of a name or path; without either the published default, else the embedded checkpoint."""
    if name is not None:
        for folder in (Path(name), CHECKPOINTS / name):
            if folder.is_dir():
                return folder.resolve()
        there = ", ".join(sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))) or "none"
        raise FileNotFoundError(f"{name}: neither a folder nor a checkpoint (there: {there}); get a published one "
                                f"with `{DOWNLOAD} NAME`, `{DOWNLOAD} --list` names them")
    if (CHECKPOINTS / DEFAULT / "config.json").exists():
        return CHECKPOINTS / DEFAULT
    note(f"{DEFAULT} is not downloaded (`{DOWNLOAD}` gets it): using {EMBEDDED}, which knows only the words of this "
         "repository and sums")
    return CHECKPOINTS / EMBEDDED


class Conversation:
    """A loaded model with its tokenizer, the sampling settings, and the cache of what was said so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.folder = arguments, find_checkpoint(arguments.model)
        self.config = Config.from_checkpoint(self.folder)
        self.tokenizer = Tokenizer.from_checkpoint(self.folder)
        if arguments.speculative and not self.config.num_nextn_predict_layers:
            raise ValueError(f"{self.folder.name} has no layer that predicts a second token; leave out --speculative")
        self.choose_thinking(arguments.thinking)
        for flag in ("chat", "system", "thinking"):
            if self.tokenizer.thinking is None and getattr(arguments, flag):
                raise ValueError(f"--{flag} does not work with {self.folder.name}, a Base checkpoint: it continues "
                                 "text and has learned no conversation")
        self.sampling = {name: given if (given := getattr(arguments, name)) is not None else getattr(self.config, name)
                         for name in ("temperature", "top_k", "top_p")}
        if self.sampling["temperature"] == 0 < self.config.temperature and self.thinking:
            note("note: without sampling, thinking tends to repeat itself without end; this checkpoint suggests "
                 f"-t {self.config.temperature}")
        self.stop_ids = set(self.config.eos_token_id)
        if self.tokenizer.thinking is not None:
            self.stop_ids.add(self.tokenizer.end_of_turn)
        self.system, self.cache, self.cached_ids = arguments.system, None, []

    def choose_thinking(self, wanted: bool | None) -> None:
        can = self.tokenizer.thinking
        if (wanted and can == "never") or (wanted is False and can == "always"):
            raise ValueError(f"{self.folder.name} {can} thinks; leave out --{'' if wanted else 'no-'}thinking")
        self.thinking = can in ("switch", "always") and wanted is not False

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The conversation as ids; ValueError if they leave no room in the context for an answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        base = self.tokenizer.thinking is None
        ids = (self.tokenizer.bos_ids + self.tokenizer.encode(messages[-1]["content"]) if base
               else self.tokenizer.chat(system + messages, self.thinking))
        check_request(self.config, [ids], self.new_tokens(ids), **self.sampling, seed=self.arguments.seed)
        return ids

    def new_tokens(self, prompt_ids: list[int]) -> int:
        """How many may be generated: what -n says, or the default as far as the context has room."""
        room = self.config.context_length - len(prompt_ids)
        wanted = self.arguments.max_new_tokens
        return min(MAX_NEW_TOKENS, max(room, 1)) if wanted is None else wanted

    def load(self, tokens: int) -> None:
        """Load the weights, if they and the cache of so many tokens fit in the device's memory."""
        device, dtype = find_device(self.arguments.device), self.arguments.dtype
        if device.type == "mps" and self.config.weight_block_size and dtype is None:
            dtype = "bfloat16"  # Apple's GPUs have no FP8
        compute = compute_dtype(self.config, CheckpointFiles(self.folder), dtype)
        per_token = KVCache.bytes_per_token(self.config, compute)
        size = check_memory(self.folder, device, dtype, tokens, tokens * per_token)
        kept = "FP8" if self.config.weight_block_size and dtype is None else str(compute).removeprefix("torch.")
        why = "" if self.arguments.device or device.type != "cpu" else " (no GPU found)"
        slow = " (slow there; --dtype bfloat16, if it fits, expands them once)" if (kept, device.type) == ("FP8", "cpu") else ""
        note(f"{self.folder.name}: {size} of weights in {kept} on {device}{why}{slow}, {per_token / 1e3:.1f} kB of cache per token")
        self.model = load_model(self.folder, device, dtype, lambda done, total: progress("loading tensor", done, total))

    def answer(self, prompt_ids: list[int]) -> str:
        """Stream the answer to a conversation; return it, without what was thought."""
        if self.cache is None:
            self.cache = new_cache(self.model, len(prompt_ids))
        # The rendered history changes behind the last question, since earlier thoughts are left out; what is
        # the same up to there need not be computed again. One token must be, to have logits.
        self.cached_ids = self.cached_ids[:self.cache.length]  # Ctrl-C may come after the cache is cut, before this is
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.cached_ids, prompt_ids)))
        self.cache.truncate(min(common, len(prompt_ids) - 1))
        speed = Speed(self.model, len(prompt_ids) - self.cache.length)
        limit = self.new_tokens(prompt_ids)
        ids = generate(self.model, prompt_ids, max_new_tokens=limit, **self.sampling, stop_ids=self.stop_ids,
                       seed=self.arguments.seed, cache=self.cache, compiled=self.arguments.compile,
                       speculative=self.arguments.speculative, acceptance=speed.acceptance,
                       progress=lambda done, total: progress("reading prompt token", done, total))
        try:
            text = self.print_answer(prompt_ids, speed.watch(ids))
        finally:
            self.cached_ids = (prompt_ids + speed.ids)[:self.cache.length]
        if len(speed.ids) == limit:
            note(f"cut off after {limit} tokens; -n allows more")
        note(speed.summary())
        return text

    def print_answer(self, prompt_ids: list[int], ids: Iterator[int]) -> str:
        control, dim = self.tokenizer.control_ids, ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
        think, first = control.get(THINK, -1), next(ids, None)
        opens = self.tokenizer.thinking is not None and first == think
        ids = ids if opens or first is None else chain([first], ids)
        if opens or think in prompt_ids[-2:]:  # some formats end the prompt with <think>, or that and a newline
            note(dim[0], end="")
            try:
                for piece in dropping_newlines(self.tokenizer.stream(takewhile(lambda id: id != control[END_THINK], ids))):
                    note(piece, end="")
            finally:
                note(dim[1])
        answer = ""
        for piece in dropping_newlines(self.tokenizer.stream(ids)):
            answer += piece
            print(piece, end="", flush=True)
        print(flush=True)
        return answer


class Speed:
    """Counts tokens and takes the time, of the prompt and of the answer apart."""

    def __init__(self, model: Model, prompt_tokens: int):
        self.prompt_tokens, self.ids, self.times = prompt_tokens, [], [time.perf_counter()]
        self.bytes_per_token, self.acceptance = bytes_per_token(model), Acceptance()

    def watch(self, ids: Iterator[int]) -> Iterator[int]:
        for token in ids:
            self.times.append(time.perf_counter())
            self.ids.append(token)
            yield token

    def summary(self) -> str:
        if not self.ids:
            return f"prompt {self.prompt_tokens} tokens · answer 0 tokens"
        start, first, last = self.times[0], self.times[1], self.times[-1]
        text = f"prompt {self.prompt_tokens} tokens, {self.prompt_tokens / (first - start):,.0f} tok/s · answer {len(self.ids)} tokens"
        if last > first:
            rate = (len(self.ids) - 1) / (last - first)
            text += f", {rate:,.1f} tok/s · "
            text += str(self.acceptance) if self.acceptance.drafted else f"reads {gigabytes(rate * self.bytes_per_token)}/s of weights"
        return text


def chat(conversation: Conversation) -> None:
    """Question and answer until /exit, the end of the input, or Ctrl-C while nothing is being answered."""
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input(), where the system has it
    note(f"A conversation; {COMMANDS}. Ctrl-C stops an answer, a second one leaves.")
    messages = []
    while True:
        line = "/exit"
        with suppress(EOFError):
            line = input("> " if sys.stdout.isatty() else "").strip()
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return
        elif command == "/clear":
            messages = []
        elif command == "/system":
            conversation.system = rest.strip()
        elif command in ("/think", "/no_think"):
            try:
                conversation.choose_thinking(command == "/think")
            except ValueError as error:
                note(f"deepseek_v3: {error}".partition(";")[0])
        elif command.startswith("/"):
            note(f"{command} is not known: {COMMANDS}")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                prompt_ids = conversation.prompt_ids(messages)
            except ValueError as error:  # the conversation has outgrown the context
                note(f"deepseek_v3: {error}; /clear starts a new conversation")
                messages.pop()
                continue
            try:
                messages.append({"role": "assistant", "content": conversation.answer(prompt_ids)})
            except KeyboardInterrupt:
                note("\nstopped; the question is forgotten")
                messages.pop()


def run(arguments: argparse.Namespace) -> None:
    if arguments.chat and arguments.prompt is not None:
        raise ValueError("--chat asks for its questions itself; leave out -p")
    conversation = Conversation(arguments)
    question = DEFAULT_PROMPT if arguments.prompt is None else arguments.prompt
    prompt_ids = conversation.prompt_ids([{"role": "user", "content": question}])
    conversation.load(len(prompt_ids) + conversation.new_tokens(prompt_ids))
    routing = Routing(conversation.model) if arguments.show_experts else None
    if arguments.prompt is None and not arguments.chat:
        note(f'asking "{DEFAULT_PROMPT}"; ask your own with -p, or converse with --chat')
    try:
        chat(conversation) if arguments.chat else conversation.answer(prompt_ids)
    finally:  # after Ctrl-C too
        if routing is not None:
            note(routing.picture())


def main(arguments: list[str] | None = None) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):  # a terminal without Unicode shows "?"
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)
    try:
        run(parse_arguments(arguments))
        return 0
    except BrokenPipeError:  # whoever reads the answer has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        note(f"deepseek_v3: {error}")
        return 2
    except KeyboardInterrupt:
        note("")
        return 130


if __name__ == "__main__":
    sys.exit(main())
