"""A training from its first step to a saved checkpoint: started, watched, interrupted, gone on with, finished."""

import hashlib
import importlib
import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from qwen3.tokenizer import END_THINK  # noqa: I001  before torch: see qwen3/__init__.py

import torch

from . import checkpoint, data, grade, lora, own_data, show, state
from .configs import KINDS, LEARNING_RATE
from .corpus import Corpus
from .training import Training, adamw, fuse_long_rows, muon_and_adamw

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
TIMED = 20  # steps from which the number of steps is worked out


@dataclass(frozen=True)
class Plan:
    """What is trained and how: the command line's choices, which an unfinished training must agree with."""
    package: str
    minutes: float | None  # one of the two is given
    steps: int | None
    seed: int
    data: str | None  # a file's path
    digest: str | None  # and the hash of what stands in it
    source: str | None  # the folder of the checkpoint to start from
    lora: int | None  # rank
    rate: float | None
    tokens: int  # of one step
    compiled: bool
    threads: int


def digest(path: Path | None) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path and path.is_file() else None


class Lesson:
    """What is learned: the rows of the batches, and three questions that are asked again and again."""

    # Held-out phrasings all (words/heldout.jsonl): no training question is worded like these. (question, thinking)
    QUESTIONS = [("why cache keys and values", False), ("so what does a gating network do", False),
                 ("whats 12+30", True)]

    def __init__(self, plan: Plan, folder: Path):
        self.module = lambda name: importlib.import_module(f"{plan.package}.{name}")
        self.plan, self.text, self.conversations = plan, None, None
        self.corpus = Corpus(KINDS[plan.package][0], plan.package)
        if plan.data:
            found = own_data.read_data(Path(plan.data))
            self.text, self.conversations = (found, None) if isinstance(found, str) else (None, found)
        if not (folder / "config.json").exists():
            self.write_small_files(folder)
        Tokenizer = self.module("tokenizer").Tokenizer
        self.tokenizer = Tokenizer.from_checkpoint(folder, "plain" if self.text else None)
        if not self.text and self.tokenizer.format is None:
            raise ValueError(f"{plan.source} has no chat format to write questions and answers in: it continues text; "
                             "give --data a text, or start from an instruct model")
        self.turns = None if self.text else data.Turns(self.tokenizer)
        self.lengths, self.rows = data.ROWS, partial(data.of_corpus, self.corpus, self.turns)
        if self.text:
            ids = self.tokenizer.encode(self.text)
            self.lengths, self.rows = {min(256, max(2, len(ids) - 1)): 1}, partial(own_data.of_text, ids)
        elif self.conversations:
            parts = own_data.parts_of(self.conversations, self.turns)
            longest = max(len(ids) for ids, _, _ in parts)
            self.lengths = {max(160, longest + 1): 1}
            self.rows = partial(own_data.of_conversations, parts, self.tokenizer.bos_ids)

    def write_small_files(self, folder: Path) -> None:
        """Tokenizer and configs: those of the checkpoint to start from, or new ones."""
        if self.plan.source:
            return checkpoint.copy_small(Path(self.plan.source), folder)
        if self.text:
            texts = [self.text]
        elif self.conversations:
            texts = ["user\nassistant\n", *("\n".join([*(m["content"] for m in messages), thought or "", answer])
                                            for messages, thought, answer in self.conversations)]
        else:
            texts = data.tokenizer_texts(self.corpus)
        library = data.train_tokenizer(texts, self.plan.package, KINDS[self.plan.package][1]["vocab_size"])
        checkpoint.write_new(folder, self.plan.package, library, chat=not self.text)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return data.batch(self.rows, self.plan.seed, step, self.lengths, self.plan.tokens)

    def questions(self) -> list[tuple[str, bool]]:
        """(question, thinking); of a text, the beginnings of three of its lines."""
        if self.text:
            lines = [line for line in self.text.splitlines() if line.strip()] or [self.text]
            return [(" ".join(line.split()[:4]), False) for line in lines[:: max(1, len(lines) // 3)][:3]]
        if self.conversations:
            chosen = self.conversations[:: max(1, len(self.conversations) // 3)][:3]
            return [(each.messages[-1]["content"], each.thought is not None) for each in chosen]
        return self.QUESTIONS

    def answer(self, model: torch.nn.Module, question: str, thinking: bool, max_new_tokens: int = 80) -> str:
        """Greedy, by the model as it now is."""
        tokenizer = self.tokenizer
        prompt = (tokenizer.bos_ids + tokenizer.encode(question) if self.text else
                  tokenizer.chat([{"role": "user", "content": question}], thinking))
        # A cache and no gradients would be another thing to compile.
        with torch.autocast("cpu", torch.bfloat16), torch.compiler.set_stance("force_eager"):
            ids = list(self.module("generate").generate(model, prompt, max_new_tokens=max_new_tokens,
                                                        stop_ids=model.config.eos_token_id))
        return " ".join(tokenizer.decode(ids).rpartition(END_THINK)[2].split())


def make_model(plan: Plan, folder: Path) -> torch.nn.Module:
    """From nothing, or from a checkpoint: in float32 to train all of it, in its own type to train LoRA."""
    module = importlib.import_module
    if not plan.source:
        model = checkpoint.new_model(folder, plan.package)
    else:
        dtype = None if plan.lora else torch.float32
        model = module(f"{plan.package}.weights").load_model(plan.source, dtype=dtype, engine=False)
    if plan.lora:
        lora.add_lora(model, plan.package, plan.lora)
    fuse_long_rows(model, module(f"{plan.package}.engine.parts").FusedAttention)
    if plan.compiled:
        for part in model.modules():
            if type(part).__name__ in (("Layer",) if plan.package == "qwen3" else ("Attention", "RMSNorm", "MLP")):
                part.compile(dynamic=True)
    return model


def optimizers_of(plan: Plan, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon where a model starts from nothing; AdamW, which pre-trained it most likely, to fine-tune."""
    if plan.source:
        small = sum(p.numel() for p in model.parameters()) < 50e6
        default = (5e-3 if small else 5e-4) if plan.lora else (2e-3 if small else 3e-5)
        return adamw(model, plan.rate or default)
    return muon_and_adamw(model, plan.rate or LEARNING_RATE[plan.package])


class Run:
    """One training in a folder, with what is remembered of it."""

    def __init__(self, plan: Plan, folder: Path):
        torch.manual_seed(plan.seed)
        torch.set_num_threads(plan.threads)  # other numbers of threads add up in other orders
        self.plan, self.folder = plan, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.lesson = Lesson(plan, folder)
        self.model = make_model(plan, folder)
        self.training = Training(self.model, optimizers_of(plan, self.model), self.lesson.batch)
        self.steps, self.losses, self.asked = plan.steps, [], []
        self.dtype = self.model.model.norm.weight.dtype if plan.lora else self.stored_dtype()

    def stored_dtype(self) -> torch.dtype:
        config = self.model.config
        return torch.bfloat16 if not self.plan.source else getattr(config, "dtype", None) or torch.bfloat16

    def resume(self, notes: dict) -> None:
        self.steps, self.losses, self.asked = notes["steps"], notes["losses"], notes["asked"]
        state.load_state(self.training, self.folder)

    def save(self) -> None:
        notes = {"plan": asdict(self.plan), "steps": self.steps, "losses": self.losses, "asked": self.asked}
        state.save_state(self.training, notes, self.folder)

    def ask(self) -> None:
        """The three questions, printed with the answers of the model as it is now."""
        answers = [self.lesson.answer(self.model, question, thinking)
                   for question, thinking in self.lesson.questions()]
        self.asked.append((self.training.step, answers))
        show.clear_progress()
        if self.losses:
            loss = recent(self.losses)
            print(f"\nstep {self.training.step:,} of {self.steps:,}   loss {loss:.3f} {show.sparkline(self.losses)}")
        else:
            print("\nbefore the first step")
        for (question, _), answer in zip(self.lesson.questions(), answers):
            print(f"  {question}\n    {answer[:300] or '(nothing)'}")
        print(end="", flush=True)

    def find_steps(self) -> None:
        """Work out how many steps fit into the minutes from the first ones; from then on the number is fixed."""
        for T in self.lesson.lengths:  # once without a step, since the first pass of each length takes longer
            self.training.losses(*data.batch(self.lesson.rows, 0, 0, {T: 1}, self.plan.tokens))[1].backward()
        started = time.monotonic()
        while self.training.step < TIMED:
            self.one_step(10**9)
        each = (time.monotonic() - started) / TIMED
        self.steps = max(TIMED, round(self.plan.minutes * 60 * 0.95 / each))  # the rest is for the questions
        print(f"a step takes {each:.2f} s: {self.steps:,} steps", flush=True)

    def one_step(self, steps: int) -> None:
        self.losses.append(round(self.training.run_step(steps), 5))

    def go_on(self) -> bool:
        """Train to the end, asking every minute; False if Ctrl-C came."""
        with after_this_step() as stopped:
            if self.steps is None:
                self.find_steps()
                self.save()
            clock, began, first = show.Clock(), time.monotonic(), self.training.step
            while self.training.step < self.steps and not stopped:
                self.one_step(self.steps)
                done = self.training.step
                left = (time.monotonic() - began) / max(done - first, 1) * (self.steps - done)
                show.progress(f"step {done:,} of {self.steps:,}   loss {recent(self.losses):.3f}   "
                              f"{show.minutes(left)} left   Ctrl-C: stop, and go on later")
                if clock.rings():
                    self.ask()
                    self.save()
            if stopped:
                self.save()
            return not stopped

    def finish(self) -> None:
        """Ask a last time, and write the weights where the state was."""
        self.ask()
        if self.plan.lora:
            lora.merge_lora(self.model)
        checkpoint.save_weights(self.model, self.folder, self.dtype)
        (self.folder / state.NAME).unlink(missing_ok=True)


def recent(losses: list[float], count: int = 20) -> float:
    """The mean of the last steps, in which single batches differ."""
    return sum(losses[-count:]) / len(losses[-count:])


@contextmanager
def after_this_step() -> Iterator[list[bool]]:
    """Ctrl-C fills the list, so that the step that it falls into is finished; a second one interrupts."""
    stopped: list[bool] = []

    def stop(*_: object) -> None:
        stopped.append(True)
        signal.signal(signal.SIGINT, before)
        show.clear_progress()

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def learn(plan: Plan, folder: Path, replace: bool, restart: bool) -> int:
    """Begin, or go on with what is unfinished in `folder`; 0, or 130 after Ctrl-C."""
    notes = None if restart else state.read_notes(folder)
    if notes:
        check_plan(plan, notes["plan"], folder)
    elif (folder / "config.json").exists() and not replace and not (restart and (folder / state.NAME).exists()):
        raise ValueError(f"{folder} holds a checkpoint: --replace writes over it, --output names another folder")
    else:
        remove_old(folder)
    run = Run(plan, folder)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    print(f"{folder.name}: {sum(p.numel() for p in run.model.parameters()):,} parameters, {trained:,} of them trained, "
          f"{plan.threads} threads", flush=True)
    if notes:
        run.resume(notes)
        print(f"going on after step {run.training.step:,} of {run.steps:,}", flush=True)
    else:
        run.ask()
    if not run.go_on():
        print(f"\nstopped after step {run.training.step:,} of {run.steps:,}; the same command goes on")
        return 130
    run.finish()
    compare(run)
    return 0


def check_plan(plan: Plan, old: dict, folder: Path) -> None:
    """ValueError where an unfinished training was begun with other settings."""
    new = asdict(plan)
    differing = [f"{key} {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]]
    if differing:
        raise ValueError(f"{folder} holds an unfinished training with other settings ({'; '.join(differing)[:120]}): give "
                         "the same to go on, --restart to begin anew, or another --output")


def remove_old(folder: Path) -> None:
    """What a checkpoint's folder may hold of an earlier one; other files stay."""
    for pattern in (*checkpoint.SMALL, "*.safetensors", "*.safetensors.part"):
        for path in folder.glob(pattern):
            path.unlink()


def compare(run: Run) -> None:
    """What was said before the first step and at the end; the loss as a curve; how to go on."""
    plan, folder = run.plan, run.folder
    print(f"\nthe loss, step by step (means of neighbours, logarithmic):\n\n{show.curve(run.losses)}\n")
    first, last = run.losses[0], recent(run.losses)
    print(f"At first it was as unsure as between {math.exp(first):,.0f} equally likely tokens, now as between "
          f"{math.exp(last):,.2f}.\n")
    (_, before), (_, after) = run.asked[0], run.asked[-1]
    for (question, _), then, now in zip(run.lesson.questions(), before, after):
        print(f"  {question}\n    before: {then[:110] or '(nothing)'}\n    now:    {now[:300]}")
    if run.lesson.conversations:
        asked = run.lesson.conversations[:100]
        right = sum(run.lesson.answer(run.model, each.messages[-1]["content"], each.thought is not None, 200)
                    == " ".join(each.answer.split()) for each in asked if len(each.messages) == 1)
        print(f"\n{right} of {sum(len(each.messages) == 1 for each in asked)} questions of the file are answered word for word")
    elif not run.lesson.text:
        from .evaluate import held_out

        print(f"\nquestions in people's own words, none of them trained on ({len(grade.questions('heldout'))}):")
        embedded = CHECKPOINTS / KINDS[plan.package][0]
        for what, where in (("this one", folder), ("embedded", embedded)):
            print(f"  {what:9} {grade.summary(held_out(plan.package, where, thinking=False))}")
    shown = folder.name if folder.parent == CHECKPOINTS else folder
    print(f"\nsaved in {folder}; ask it:\n  uv run python -m {plan.package}.main -m {shown} -p "
          f'"{run.lesson.questions()[0][0]}"', flush=True)
