"""From a command line to the data of a page: one checkpoint, one recorded run, and those that it is compared with.

The package's own main has the flags, the prompt and the settings, and the same refusals come before the weights are
loaded. Only the answer goes to standard output.
"""

import argparse
import importlib
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from .after import forced
from .data import run_data
from .lessons import lessons
from .limits import PAGE, Rows, check_steps
from .pack import Words, small_numbers, visible
from .page import as_json, check_output, page, write
from .record import Recorder
from .switch import Part, check_part, parse_parts, switched
from .terminal import report

REFUSED = {"compile": "a compiled step cannot be listened to", "chat": "an X-ray is of one answer",
           "show_experts": "the X-ray shows the experts itself"}


class Program:
    """A package's program with a checkpoint: everything but the weights, which `load` brings."""

    def __init__(self, own: argparse.Namespace, words: Sequence[str]):
        self.package = find_package(own.model)
        self.main = self.module("main")
        asked = [*(["-m", own.model] if own.model is not None else []),
                 *(["-p", own.prompt] if own.prompt is not None else []), *words]
        self.arguments = arguments = self.main.parse_arguments(asked)
        for flag, why in REFUSED.items():
            if getattr(arguments, flag, False):
                raise ValueError(f"--{flag.replace('_', '-')} does not go with an X-ray: {why}; leave it out")
        if arguments.max_new_tokens == 0:
            raise ValueError("-n 0: an X-ray shows how a token came about, so it needs one; -n 1 or more")
        self.speculative = getattr(arguments, "speculative", False)
        main = self.main
        self.folder, notes = main.find_checkpoint(arguments.model, main.CHECKPOINTS, main.DEFAULT, main.EMBEDDED,
                                                  main.DOWNLOAD)
        self.config, _ = main.read_checkpoint(self.folder)
        self.tokenizer = main.Tokenizer.from_checkpoint(self.folder, **main.chat_format(arguments))
        self.conversation = main.Conversation(arguments, self.folder, self.config, self.tokenizer)
        if self.speculative:
            main.check_drafting(self.config)
        question = main.find_question(arguments)
        self.question = main.DEFAULT_PROMPT if question is None else question
        self.seed = arguments.seed
        if self.seed is None and self.conversation.sampling["temperature"]:  # the same for runs that are compared
            self.seed = int.from_bytes(os.urandom(4), "big")
        self.notes = [*notes, *self.conversation.notes()]

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")

    def prompt_ids(self, question: str) -> list[int]:
        return self.conversation.prompt_ids([{"role": "user", "content": question}])

    def load(self, prompt_ids: list[int]) -> None:
        device, dtype = self.conversation.find_device(prompt_ids)
        for text in self.notes:
            self.main.note(f"note: {text}")
        self.model = self.main.load_model(self.folder, device, dtype, self.main.progress("loading tensor"),
                                          engine=not self.arguments.plain)

    def generate(self, prompt_ids: list[int]):
        more = {"speculative": True} if self.speculative else {}
        conversation = self.conversation
        return self.main.generate(self.model, prompt_ids, max_new_tokens=conversation.new_tokens(prompt_ids),
                                  stop_ids=conversation.stop_ids, seed=self.seed, **conversation.sampling, **more)


def find_package(model: str | None) -> str:
    """The package that runs this checkpoint, by its model_type. What cannot be read is refused by the package later."""
    from qwen3 import main
    from qwen3.engine.supported import PACKAGES

    folder, _ = main.find_checkpoint(model, main.CHECKPOINTS, main.DEFAULT, main.EMBEDDED, main.DOWNLOAD)
    with suppress(OSError, ValueError, AttributeError, TypeError):
        return PACKAGES[json.loads((folder / "config.json").read_text("utf-8")).get("model_type")]
    return "qwen3"


@dataclass
class Recording:
    """One recorded run: what was asked, what came, and which parts were off."""

    seen: Recorder
    question: str
    prompt: int  # tokens of the prompt
    ids: list[int]  # of prompt and answer, and the token that ended it where one did
    answer: str
    parts: Sequence[Part] = ()


def record(program: Program, question: str, asked: tuple[int, int] | None, parts: Sequence[Part] = (),
           show: bool = False) -> Recording:
    """One run with `parts` off; `show` streams the answer to standard output."""
    prompt_ids, new_ids = program.prompt_ids(question), []

    def watched(ids):
        for id in ids:
            new_ids.append(id)
            yield id

    rows = Rows(program.config, len(prompt_ids), asked, program.tokenizer.control_ids.get("</think>"))
    with switched(program.model, parts), Recorder(program.package, program.model, rows) as seen:
        ids = watched(program.generate(prompt_ids))
        answer = (program.module("engine.terminal").show_answer(program.tokenizer, prompt_ids, ids) if show
                  else program.tokenizer.decode(ids))
    ids = seen.finish(prompt_ids, new_ids, program.conversation.stop_ids)
    return Recording(seen, question, len(prompt_ids), ids, answer.strip(), parts)


def page_data(program: Program, recordings: Sequence[Recording], meta: dict) -> dict:
    """What the page shows, of the first run and of those that it is compared with; below the bytes of a page."""
    while True:
        words = Words(program.tokenizer)
        data = {"meta": meta, "runs": [one_run(program, words, recordings[0], one) for one in recordings],
                "words": words.table}
        if len(as_json(data).encode()) <= PAGE * 0.97:  # script and style want some, too
            return data
        for one in recordings:  # the estimate of limits.py was too low
            kept = list(one.seen.rows.items())
            if len(kept) < 2:
                raise ValueError("prompt and answer alone are more than a page has room for; ask a shorter question")
            one.seen.rows = dict(kept[:len(kept) * 3 // 4])


def one_run(program: Program, words: Words, whole: Recording, one: Recording) -> dict:
    """What the page needs of one recording; `whole` is the run without anything switched off."""
    generate, first = program.module("generate"), one is whole
    run = run_data(one.seen, generate, words, one.ids, one.prompt, program.conversation.sampling, full=first)
    run |= {"question": visible(one.question[:2000]), "answer": visible(one.answer)}
    run["off"] = [str(part) for part in one.parts]
    run["ended"] = len(one.ids) - one.prompt > 0 and one.ids[-1] in program.conversation.stop_ids
    run["title"] = "this run" if first else f"without {', '.join(run['off'])}" if one.parts else run["question"]
    if run["off"] == ["wrong rope"]:
        run["title"] = "with the wrong pairs rotated"
    if one.parts:  # what was written in the whole run, with the part off in each step alone
        rows = list(whole.seen.rows)
        run["forced"] = small_numbers(forced(program.model, generate, whole.ids, rows, one.parts), 5)
    return run


def describe(program: Program, command: Sequence[str]) -> dict:
    """How the page was made, for its last lines; folders are cut to their names."""
    model, arguments = program.model, program.arguments
    words, norm = list(command), model.model.norm.weight
    for i, word in enumerate(words[1:], start=1):
        if words[i - 1] in ("-m", "--model", "-o", "--output"):
            words[i] = Path(word).name
        elif len(word) > 300:
            words[i] = f"{word[:300]}…"
    return {"command": visible("python -m scripts.xray " + shlex.join(words)), "package": program.package,
            "model": visible(program.conversation.name), "sampling": program.conversation.sampling,
            "seed": program.seed, "parameters": sum(weight.numel() for weight in model.parameters()),
            "dtype": str(norm.dtype).removeprefix("torch."), "device": norm.device.type, "torch": torch.__version__,
            "plain": bool(arguments.plain), "speculative": program.speculative, "vocabulary": program.config.vocab_size,
            "lessons": lessons(program.package)}


def run(own: argparse.Namespace, words: Sequence[str], command: Sequence[str]) -> None:
    """What the command does. What can be refused is refused before the weights are loaded."""
    if own.output is not None:
        check_output(own.output)
    program = Program(own, words)
    note = program.main.note
    prompt_ids = program.prompt_ids(program.question)
    check_steps(program.config, own.steps, len(prompt_ids), program.conversation.new_tokens(prompt_ids))
    compared = [(program.question, parse_parts(text)) for text in own.without]
    compared += [(program.question, [Part("wrong rope")])] if own.wrong_rope else []
    for part in [part for _, parts in compared for part in parts]:
        check_part(part, program.config)
    compared += [(question, []) for question in own.against]
    for question in own.against:
        program.prompt_ids(question)  # is there room for it?

    program.load(prompt_ids)
    recordings = [record(program, program.question, own.steps, show=True)]
    for question, parts in compared:
        recordings.append(record(program, question, own.steps, parts))
    if own.steps and not recordings[0].seen.rows:
        raise ValueError(f"--steps {own.steps[0]}-{own.steps[1]}: this run has only {len(recordings[0].ids)} tokens, "
                         f"numbered from 0; the answer begins at {recordings[0].prompt}")
    data = page_data(program, recordings, describe(program, command))
    for other in data["runs"][1:]:
        note(f"{other['title']}: {' '.join(other['answer'].split())}"[:300])
    if own.output is None:
        note(report(data))
        return
    text = page(data)
    write(own.output, text)
    kept, every = len(data["runs"][0]["steps"]), len(data["runs"][0]["tokens"]) - 1
    note(f"{own.output}: {len(text.encode()) / 1e3:,.0f} kB, {kept} of {every} tokens; it holds the question and the "
         "answer as text, so whoever gets the page can read them")
