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

from . import checkpoint, data, grade, lora, show, state, together
from .configs import KINDS
from .own_data import Conversation, read_data
from .task import Plan, Task, check_trainable, make_model, optimizers_of
from .training import Training

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
TIMED = 20  # steps from which the number of steps is worked out


class Run:
    """One training in a folder, with what is remembered of it. Of several processes only the first writes there."""

    def __init__(self, plan: Plan, folder: Path):
        torch.set_num_threads(plan.threads)  # other numbers of threads add up in other orders
        self.plan, self.folder = plan, folder
        self.task = make_task(plan, folder)
        torch.manual_seed(plan.seed)
        self.model = make_model(plan, folder)
        together.like_first(p.data for p in self.model.parameters() if p.requires_grad)
        self.training = Training(self.model, optimizers_of(plan, self.model), self.task.batch, plan.mixed)
        self.steps, self.losses, self.asked, self.stopped = plan.steps, [], [], []
        self.dtype = self.model.model.norm.weight.dtype if plan.lora and plan.mixed else self.stored_dtype()

    def stored_dtype(self) -> torch.dtype:
        config = self.model.config
        return torch.bfloat16 if not self.plan.source else getattr(config, "dtype", None) or torch.bfloat16

    def resume(self, notes: dict) -> None:
        self.steps, self.losses, self.asked = notes["steps"], notes["losses"], notes["asked"]
        state.load_state(self.training, self.folder)

    def save(self) -> None:
        if together.is_first():
            notes = {"plan": asdict(self.plan), "processes": together.ranks(), "steps": self.steps,
                     "losses": self.losses, "asked": self.asked}
            state.save_state(self.training, notes, self.folder)

    def ask(self) -> None:
        """The three questions, printed with the answers of the model as it is now."""
        if not together.is_first():
            return
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
        """Work out how many steps fit into the minutes from the first ones; from then on the number is fixed.

        After Ctrl-C it is left open.
        """
        for T in self.task.lengths:  # once without a step, since the first pass of each length takes longer
            batch = data.batch(self.task.rows, 0, 0, {T: 1}, self.plan.tokens)
            self.training.losses(*(ids.to(self.plan.device) for ids in batch))[1].backward()
        started = time.monotonic()
        while self.training.step < TIMED:
            if self.is_stopped():
                return
            self.one_step(10**9)
        each = together.of_first(lambda: (time.monotonic() - started) / TIMED)
        self.steps = max(TIMED, round(self.plan.minutes * 60 * 0.95 / each))  # the rest is for the questions
        print(f"a step takes {each:.2f} s: {self.steps:,} steps", flush=True)

    def one_step(self, steps: int) -> None:
        self.losses.append(round(self.training.run_step(steps), 5))

    def is_stopped(self) -> bool:
        """Whether Ctrl-C came, to one of the processes: all end after the same step."""
        return together.any_of(bool(self.stopped))

    def go_on(self) -> bool:
        """Train to the end, asking every minute; False if Ctrl-C came."""
        with after_this_step() as self.stopped:
            if self.steps is None:
                self.find_steps()
                if self.steps is None:
                    return False  # what was saved before the first step is enough
                self.save()
            clock, began, first = show.Clock(), time.monotonic(), self.training.step
            while not (stopped := self.is_stopped()) and self.training.step < self.steps:
                self.one_step(self.steps)
                done = self.training.step
                left = (time.monotonic() - began) / max(done - first, 1) * (self.steps - done)
                show.progress(f"step {done:,} of {self.steps:,}   loss {recent(self.losses):.3f}   "
                              f"{show.minutes(left)} left   Ctrl-C: stop, and go on later")
                if together.is_first() and clock.rings():  # the others wait in the next step
                    with clock.paused():
                        self.ask()
                        self.save()
            if stopped:
                self.save()
                together.wait()  # for the file, before one of them ends and torchrun ends all
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


def make_task(plan: Plan, folder: Path) -> Task:
    """The task, in every process; the first writes its files. ValueError where so many cannot share its steps."""
    if together.is_first():
        folder.mkdir(parents=True, exist_ok=True)
        task = Task(plan, folder)
        together.wait()
    else:
        together.wait()
        if not (folder / "config.json").exists():
            raise ValueError(f"{folder}, where the first process writes, is not seen here; give all machines a folder "
                             "that they share with --output")
        task = Task(plan, folder)
    together.check_rows(task.lengths, plan.tokens)
    return task


def learn(plan: Plan, folder: Path, replace: bool, restart: bool) -> int:
    """Begin, or go on with what is unfinished in `folder`; 0, or 130 after Ctrl-C."""
    notes = together.of_first(lambda: begin(plan, folder, replace, restart))
    run, ranks = Run(plan, folder), together.ranks()
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    print(f"{folder.name}: {sum(p.numel() for p in run.model.parameters()):,} parameters, {trained:,} of them trained, "
          + (f"{ranks} processes, each with " if ranks > 1 else "") + f"{plan.threads} threads", flush=True)
    if notes:
        run.resume(notes)
        print(f"going on after step {run.training.step:,}" + (f" of {run.steps:,}" if run.steps else ""), flush=True)
    else:
        run.ask()
        run.save()  # so that the same command goes on, whenever it is killed
    if not run.go_on():
        after = f"after step {run.training.step:,} of {run.steps:,}" if run.steps else "before its steps were counted"
        print(f"\nstopped {after}; the same command goes on")
        return 130
    if together.is_first():
        run.finish()
        compare(run)
    return 0


def begin(plan: Plan, folder: Path, replace: bool, restart: bool) -> dict | None:
    """What an unfinished training wrote down, or None and room for a new one. ValueError where neither can be."""
    notes = None if restart else state.read_notes(folder)
    if notes:
        check_plan(plan, notes, folder)
    elif (folder / "config.json").exists():
        if not replace and not (restart and (folder / state.NAME).exists()):
            raise ValueError(f"{folder} holds a checkpoint: --replace writes over it, --output names another folder")
        check_before(plan)  # the old one stays if the new one cannot begin
        remove_old(folder)
    else:
        check_before(plan)
    return notes


def check_plan(plan: Plan, notes: dict, folder: Path) -> None:
    """ValueError where an unfinished training was begun with other settings.

    In another number of processes it may go on: sums are rounded otherwise then, as by other numbers of threads.
    """
    new, old = asdict(plan), {"dtype": Plan.dtype} | notes["plan"]  # which older notes lack
    if notes.get("processes", 1) != together.ranks():
        del new["threads"]
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
    if not plan.data:
        together.check_rows(data.ROWS, plan.tokens)


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
