"""A conversation with a loaded model: how its prompts are made, what is kept between answers, and the commands.

Nothing here knows how an answer is computed: main.py hands in a function that yields its ids.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import torch

from ..config import Config
from ..generate import new_cache
from ..model import Model
from ..tokenizer import Tokenizer
from .arguments import MAX_NEW_TOKENS, SAMPLING, name_of
from .memory import find_device, gigabytes
from .prepare import compute_dtype
from .processes import check_alike, on_first, ranks
from .requests import check_request
from .rounding import BITS
from .safetensors_reader import CheckpointFiles
from .sizes import bytes_in_memory, bytes_per_token, cache_bytes_per_token, check_memory, keep_or_expand
from .terminal import PACKAGE, Questions, is_terminal, note, progress, show_answer

COMMANDS = "/clear forgets the conversation, /system TEXT sets the system prompt, /think, /no_think, /exit"
HELP = """\
/clear            forget the conversation
/system TEXT      set the system prompt; without a text there is none
/think, /no_think reason before answering, or do not
/exit             leave; so do /quit, exit, quit and the end of the input
/help             this text
A question may follow /clear, /think and /no_think on the same line. //TEXT asks a TEXT that begins with a slash.
Several pasted lines are one question. """
CTRL_C = "Ctrl-C stops an answer, clears a half-typed line, and leaves at an empty one."


def chat_format(arguments: argparse.Namespace) -> dict[str, str]:
    """The tokenizer's argument: who asks for a conversation gets one, even if the files look like a Base."""
    asked = arguments.chat or arguments.system or arguments.thinking is not None
    wanted = arguments.chat_format or ("template" if asked else None)
    return {"chat_format": wanted} if wanted else {}


class Conversation:
    """How a checkpoint is asked: prompt, sampling settings, and the cache of what was said so far."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, config: Config, tokenizer: Tokenizer):
        self.arguments, self.folder, self.config, self.tokenizer = arguments, folder, config, tokenizer
        self.name = name_of(folder)
        self.choose_thinking(arguments.thinking)
        for flag in ("chat", "system", "thinking"):
            if tokenizer.thinking is None and getattr(arguments, flag):
                if arguments.chat_format:
                    raise ValueError(f"--{flag} does not go with --chat-format {arguments.chat_format[:80]}, which "
                                     "continues text")
                raise ValueError(f"--{flag} does not work with {self.name}, a Base checkpoint or one whose chat format "
                                 "is not known: it continues text; --chat-format NAME sets a format")
        self.sampling = {}
        for name in SAMPLING:
            given = getattr(arguments, name)
            value = getattr(config, name) if given is None else given
            if value is not None or name in SAMPLING[:3]:
                self.sampling[name] = value
        self.stop_ids = set(config.eos_token_id)
        if tokenizer.thinking is not None and tokenizer.end_of_turn is not None:
            self.stop_ids.add(tokenizer.end_of_turn)
        self.system, self.cache, self.cached_ids = arguments.system, None, []

    def choose_thinking(self, wanted: bool | None) -> None:
        can = self.tokenizer.thinking
        if (wanted and can == "never") or (wanted is False and can == "always"):
            raise ValueError(f"{self.name} {can} thinks; leave out --{'' if wanted else 'no-'}thinking")
        self.thinking = can in ("switch", "always") and wanted is not False

    def notes(self) -> Iterator[str]:
        """What the user should know about this checkpoint and these flags."""
        yield from self.config.notes
        yield from self.tokenizer.notes
        arguments = self.arguments
        if self.tokenizer.thinking is None and arguments.thinking is False:
            yield f"--no-thinking changes nothing: {self.name} continues plain text"
        if self.sampling["temperature"] == 0:
            if self.config.temperature > 0 and self.thinking:
                yield ("without sampling, thinking tends to repeat itself without end; this checkpoint suggests "
                       f"-t {self.config.temperature}")
            flags = {"-k": arguments.top_k, "--top-p": arguments.top_p, "--min-p": arguments.min_p,
                     "--seed": arguments.seed}
            idle = ", ".join(flag for flag, value in flags.items() if value is not None)
            if idle:
                yield (f"{idle}: without effect at temperature 0, which always takes the likeliest token; sampling "
                       "needs a -t above 0, such as -t 1")

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The conversation as ids; ValueError if they leave no room in the context for an answer."""
        ids = self.encode(messages)
        check_request(self.config, [ids], self.new_tokens(ids), **self.sampling, seed=self.arguments.seed)
        return ids

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids alone; the system prompt of the flags comes first, unless the conversation begins with its own."""
        if self.tokenizer.thinking is None:
            return self.tokenizer.bos_ids + self.tokenizer.encode(messages[-1]["content"])
        own = messages[0].get("role") == "system"
        system = [{"role": "system", "content": self.system}] if self.system and not own else []
        return self.tokenizer.chat(system + messages, self.thinking)

    def new_tokens(self, prompt_ids: list[int]) -> int:
        """How many may be generated: what -n says, or the default as far as the context has room."""
        room = self.config.context_length - len(prompt_ids)
        wanted = self.arguments.max_new_tokens
        return min(MAX_NEW_TOKENS, max(room, 1)) if wanted is None else wanted

    def find_device(self, prompt_ids: list[int]) -> tuple[torch.device, str | None]:
        """(device, dtype or None for the checkpoint's own), if weights and cache fit there; says how large they are."""
        device, new = find_device(self.arguments.device), self.new_tokens(prompt_ids)
        check_alike("device and command", (device.type, self.arguments.dtype, prompt_ids, new, self.sampling))
        return self.find_room(len(prompt_ids) + new)

    def find_room(self, tokens: int, processes: int = 1) -> tuple[torch.device, str | None]:
        """find_device for a cache of so many tokens, in each of several processes that share a CPU's memory."""
        device, dtype, remark = find_device(self.arguments.device), self.arguments.dtype, ""
        if device.type == "mps" and self.config.quantization and dtype is None:
            dtype = "bfloat16"  # Apple's GPUs have neither FP8 nor the kernels for integers
        compute = compute_dtype(self.config, CheckpointFiles(self.folder), None if dtype == "fp8" else dtype)
        per_token, more = cache_bytes_per_token(self.config, compute), 0
        if device.type == "cpu" and processes > 1:
            tokens *= processes
        if "fp8" in (self.config.quantization, dtype):
            dtype, remark = keep_or_expand(self.folder, device, dtype, tokens * per_token, processes)
        # Weights that need no conversion stay in one file for all; integers are packed by each process.
        if device.type == "cpu" and (dtype or self.config.quantization not in (None, "fp8")):
            more = (processes - 1) * bytes_in_memory(self.folder, dtype)
        size = check_memory(self.folder, device, dtype, tokens, tokens * per_token + more)
        name = self.config.quantization
        kept = (name if "-" in name else name.upper()) if name and dtype is None else (
            dtype if dtype in BITS else str(compute).removeprefix("torch."))
        why = "" if self.arguments.device or device.type != "cpu" else " (no GPU found)"
        why += f", the share of one of {ranks()} processes" if ranks() > 1 else ""
        why += remark
        note(f"{self.name}: {size} of weights in {kept} on {device}{why}, {per_token / 1e3:.1f} kB of cache per token")
        return device, dtype

    def begin(self, model: Model, answer_ids: Callable[..., Iterator[int]], remark: Callable[[], str] = str) -> None:
        """From now on `answer_ids(prompt_ids, max_new_tokens=, cache=)` answers; `remark` may replace the bandwidth."""
        self.model, self.answer_ids, self.remark = model, answer_ids, remark

    def answer(self, prompt_ids: list[int]) -> str:
        """Stream the answer to a conversation; return it, without what was thought."""
        if self.cache is None:
            self.cache = new_cache(self.model, len(prompt_ids))
        # The rendered history changes after the last question, since earlier reasoning is left out. What is
        # the same up to there need not be computed again. One token must be, to have logits.
        cached = self.cached_ids[:self.cache.length]  # Ctrl-C may have come before the last of them were computed
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(cached, prompt_ids)))
        self.cache.truncate(min(common, len(prompt_ids) - 1))
        limit = self.new_tokens(prompt_ids)
        speed = Speed(self.model, len(prompt_ids) - self.cache.length)
        reading = Reading(self.model, len(prompt_ids) - self.cache.length, progress("reading prompt token"))
        try:
            ids = self.answer_ids(prompt_ids, max_new_tokens=limit, cache=self.cache)
            text = show_answer(self.tokenizer, prompt_ids, speed.watch(ids))
        finally:
            reading.end()
            self.cached_ids = prompt_ids + speed.ids
        if len(speed.ids) == limit:
            room = self.config.context_length
            full = len(prompt_ids) + limit >= room
            why = f": the context of {room} tokens is full" if full else "; -n allows more"
            note(f"cut off after {limit} tokens{why}")
        note(speed.summary(self.remark()))
        if is_terminal(sys.stderr) and not self.arguments.chat and not self.arguments.compile:
            model = "" if self.arguments.model else f" -m {self.name}"
            note(f"see inside: uv run python -m scripts.xray{model} -o page.html, with the flags of this run")
        return text


class Reading:
    """Shows how far a prompt is read, by listening to the layers; a layer counts as its share of a token."""

    def __init__(self, model: Model, tokens: int, show: Callable[[int, int], None]):
        layers = model.model.layers[:model.config.num_hidden_layers]
        self.done, self.all, self.tokens, self.show = 0, tokens * len(layers), tokens, show
        self.hooks = [layer.register_forward_hook(self.passed) for layer in layers]

    def passed(self, layer: torch.nn.Module, inputs: tuple, x: torch.Tensor) -> None:
        self.done += x.shape[1]
        self.show(self.done * self.tokens // self.all, self.tokens)
        if self.done >= self.all:
            self.end()

    def end(self) -> None:
        """Stop listening: decoding takes place without it."""
        for hook in self.hooks:
            hook.remove()


class Speed:
    """Counts tokens and takes the time, of the prompt and of the answer apart."""

    def __init__(self, model: Model, prompt_tokens: int):
        self.prompt_tokens, self.ids, self.times = prompt_tokens, [], [time.perf_counter()]
        self.bytes_per_token = bytes_per_token(model)

    def watch(self, ids: Iterator[int]) -> Iterator[int]:
        for token in ids:
            self.times.append(time.perf_counter())
            self.ids.append(token)
            yield token

    def summary(self, remark: str = "") -> str:
        if not self.ids:
            return f"prompt {self.prompt_tokens} tokens · answer 0 tokens"
        start, first, last = self.times[0], self.times[1], self.times[-1]
        rate = self.prompt_tokens / (first - start)
        text = f"prompt {self.prompt_tokens} tokens, {rate:,.0f} tok/s · answer {len(self.ids)} tokens"
        if last > first:
            rate = (len(self.ids) - 1) / (last - first)
            text += f", {rate:,.1f} tok/s · {remark or f'reads {gigabytes(rate * self.bytes_per_token)}/s of weights'}"
        return text


def split_command(line: str) -> tuple[str, str]:
    """(command, the rest) of what was typed; the command is "" for a question.

    What looks like a mistyped command is one, to be answered with a note: /what, /sytem Be brief. /usr/bin is none.
    """
    first, rest = (line.split(maxsplit=1) + ["", ""])[:2]
    if line.strip().lower() in ("exit", "quit"):
        return "/exit", ""
    if first in ("/clear", "/system", "/think", "/no_think", "/exit", "/quit", "/help") or (
            "\n" not in line and re.fullmatch(r"/[A-Za-z_]+", first)):
        return first, rest.strip()
    return "", line[1:] if line.startswith("//") and "\n" not in line else line


def chat(conversation: Conversation) -> None:
    """Question and answer until /exit, the end of the input, or Ctrl-C at an empty line."""
    ctrl_c = CTRL_C if ranks() == 1 else "Ctrl-C ends the program."
    note(f"A conversation; {COMMANDS}, /help. {ctrl_c}")
    questions = Questions(lambda line: split_command(line) in [(name, "") for name in (
        "/clear", "/system", "/think", "/no_think", "/exit", "/quit", "/help")])
    messages: list[dict[str, str]] = []
    while True:
        try:
            command, text = split_command(on_first(questions.read))
        except EOFError:
            return
        if command in ("/exit", "/quit") and not text:
            return
        if command in ("/exit", "/quit", "/help") and text:
            note(f"{command} takes no text; /{command} {text} asks that as a question"[:299])
            continue
        if command == "/help":
            note(HELP + ctrl_c)
        elif command == "/clear":
            messages = []
        elif command == "/system":
            conversation.system = text
            continue
        elif command in ("/think", "/no_think"):
            try:
                conversation.choose_thinking(command == "/think")
            except ValueError as error:
                note(f"{PACKAGE}: {error}".partition(";")[0])
        elif command:
            note(f"{command} is not known: {COMMANDS}; a question that begins with a slash needs two")
            continue
        if text.strip():
            ask(conversation, messages, text)
            questions.answered = time.monotonic()


def ask(conversation: Conversation, messages: list[dict[str, str]], question: str) -> None:
    """One more question and its answer, if the context has room for them and the user waits for it."""
    count = len(messages)
    try:
        messages.append({"role": "user", "content": question})
        try:
            prompt_ids = conversation.prompt_ids(messages)
        except ValueError as error:  # the conversation has outgrown the context
            note(f"{PACKAGE}: {error}; /clear starts a new conversation")
            del messages[count:]
        else:
            messages.append({"role": "assistant", "content": conversation.answer(prompt_ids)})
    except KeyboardInterrupt:
        note("\nstopped; the question is forgotten")
        del messages[count:]
