"""A training from its first step to a saved checkpoint: started, watched, interrupted, gone on with, finished."""

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from qwen3.tokenizer import END_THINK  # noqa: F401, I001  before torch: see qwen3/__init__.py

import torch

from . import checkpoint, data, grade, lora, show, state
from .configs import KINDS
from .own_data import Conversation, read_data
from .task import Plan, Task, check_trainable, make_model, optimizers_of
from .training import Training

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
TIMED = 20  # steps from which the number of steps is worked out


class Run:
    """One training in a folder, with what is remembered of it."""

    def __init__(self, plan: Plan, folder: Path):
        torch.manual_seed(plan.seed)
        torch.set_num_threads(plan.threads)  # other numbers of threads add up in other orders
        self.plan, self.folder = plan, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.task = Task(plan, folder)
        self.model = make_model(plan, folder)
        self.training = Training(self.model, optimizers_of(plan, self.model), self.task.batch)
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
        answers = [self.task.answer(self.model, question, thinking)
                   for question, thinking in self.task.questions()]
        self.asked.append((self.training.step, answers))
        show.clear_progress()
        if self.losses:
            loss = recent(self.losses)
            print(f"\nstep {self.training.step:,} of {self.steps:,}   loss {loss:.3f} {show.sparkline(self.losses)}")
        else:
            print("\nbefore the first step")
        for (question, _), answer in zip(self.task.questions(), answers):
            print(f"  {question}\n    {short(answer)}")
        print(end="", flush=True)

    def find_steps(self) -> None:
        """Work out how many steps fit into the minutes from the first ones; from then on the number is fixed."""
        for T in self.task.lengths:  # once without a step, since the first pass of each length takes longer
            batch = data.batch(self.task.rows, 0, 0, {T: 1}, self.plan.tokens)
            self.training.losses(*(ids.to(self.plan.device) for ids in batch))[1].backward()
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
                    with clock.paused():
                        self.ask()
                        self.save()
            if stopped:
                self.save()
            return not stopped

    def finish(self) -> None:
        """Ask a last time, and write the weights, and the losses of all steps, where the state was."""
        self.ask()
        if self.plan.lora:
            lora.merge_lora(self.model)
        checkpoint.save_weights(self.model, self.folder, self.dtype)
        (self.folder / checkpoint.LOSSES).write_text(json.dumps(self.losses))
        (self.folder / state.NAME).unlink(missing_ok=True)


def short(answer: str, length: int = 240) -> str:
    return (answer if len(answer) <= length else answer[:length] + " …") or "(nothing)"


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
    elif (folder / "config.json").exists():
        if not replace and not (restart and (folder / state.NAME).exists()):
            raise ValueError(f"{folder} holds a checkpoint: --replace writes over it, --output names another folder")
        check_before(plan)  # the old one stays if the new one cannot begin
        remove_old(folder)
    else:
        check_before(plan)
    run = Run(plan, folder)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    print(f"{folder.name}: {sum(p.numel() for p in run.model.parameters()):,} parameters, {trained:,} of them trained, "
          f"{plan.threads} threads", flush=True)
    if notes:
        run.resume(notes)
        print(f"going on after step {run.training.step:,}" + (f" of {run.steps:,}" if run.steps else ""), flush=True)
    else:
        run.ask()
        run.save()  # so that the same command goes on, whenever it is killed
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
        raise ValueError(f"{folder} holds an unfinished training with other settings ({'; '.join(differing)[:120]}): "
                         "the same ones go on, --restart begins anew, --output names another folder")


def check_before(plan: Plan) -> None:
    """ValueError or FileNotFoundError for data and a checkpoint that no training can begin with."""
    if plan.data:
        read_data(Path(plan.data))
    if plan.source:
        check_trainable(plan)


def remove_old(folder: Path) -> None:
    """The files of the checkpoint that is replaced, those that a training writes; whatever else is there stays."""
    for pattern in checkpoint.WRITTEN:
        for path in folder.glob(pattern):
            path.unlink()


def is_known(run: Run, taught: Conversation) -> bool:
    """Answered word for word? Longer than what was taught it need not become."""
    room = len(run.task.tokenizer.encode((taught.thought or "") + taught.answer)) + 16
    said = run.task.answer(run.model, taught.messages[-1]["content"], taught.thought is not None, room)
    return said == " ".join(taught.answer.split())


def compare(run: Run) -> None:
    """What was said before the first step and at the end; the loss as a curve; how to go on."""
    plan, folder = run.plan, run.folder
    print(f"\nthe loss, step by step (means of neighbours, logarithmic):\n\n{show.curve(run.losses)}\n")
    first, last = run.losses[0], recent(run.losses)
    print(f"At first it was as unsure as between {math.exp(first):,.0f} equally likely tokens, now as between "
          f"{math.exp(last):,.2f}.\n")
    (_, before), (_, after) = run.asked[0], run.asked[-1]
    for (question, _), then, now in zip(run.task.questions(), before, after):
        print(f"  {question}\n    before: {short(then, 70)}\n    now:    {short(now)}")
    if run.task.conversations:
        asked = [each for each in run.task.conversations if len(each.messages) == 1][:100]
        right = sum(is_known(run, each) for each in asked)
        print(f"\n{right} of {len(asked)} questions of the file are answered word for word")
    elif not run.task.text:
        from .evaluate import held_out

        print(f"\nquestions in people's own words, none of them trained on ({len(grade.questions('heldout'))}):")
        embedded = CHECKPOINTS / KINDS[plan.package][0]
        for what, where in (("this one", folder), ("embedded", embedded)):
            print(f"  {what:9} {grade.summary(held_out(plan.package, where, thinking=False))}")
    shown = folder.name if folder.parent == CHECKPOINTS else folder
    print(f"\nsaved in {folder}; ask it:\n  uv run python -m {plan.package}.main -m {shown} -p "
          f'"{run.task.questions()[0][0]}"', flush=True)
