"""Listening to a model without touching it: put on with `with`, taken off at its end whatever happened in between."""

import time
from collections.abc import Callable
from contextlib import ExitStack

import torch


class Listener:
    """Hooks on modules and functions that are also listened to; takes the time of both, without its own.

    A subclass says in `put_on` what it wants to hear.
    """

    def __init__(self, model: torch.nn.Module):
        self.device = model.model.norm.weight.device
        self.seconds: dict[tuple[str, str], float] = {}  # (part, "prompt" or "answer")
        self.total: dict[str, float] = {}
        self.own = 0.0  # seconds that listening took; in none of the times above
        self.phase = "prompt"
        self.inside = False  # a pass of the model, and not a draft layer's, which uses embedding and head too
        self.drafting = self.muted = False

    def put_on(self) -> None:
        raise NotImplementedError

    def __enter__(self):
        with ExitStack() as stack:  # an error half-way takes off what is on already
            self.stack = stack
            self.put_on()
            self.stack = stack.pop_all()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.end_phase()
        self.stack.close()

    def before(self, module: torch.nn.Module, look: Callable) -> None:
        """look(*arguments) before the module runs."""
        def hook(_, args, more):
            self.measured(look, *args, *more.values())
        self.stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: torch.nn.Module, look: Callable | None, part: str = "", inside: bool = True) -> None:
        """look(arguments, result) after the module ran; its time is that of `part`.

        What a draft layer does is none of a row's, and it uses embedding and head too: `inside` a pass alone.
        """
        begun = []

        def start(*_):
            begun.append(self.clock())

        def end(_, args, out):
            started = begun.pop() if part else 0
            if self.drafting or inside and not self.inside:
                return
            if part:
                self.add_time(part, started)
            if look:
                self.measured(look, args, out)

        if part:
            self.stack.callback(module.register_forward_pre_hook(start).remove)
        self.stack.callback(module.register_forward_hook(end).remove)

    def listen(self, owner: object, name: str, look: Callable) -> None:
        """owner.name runs as it always does; then look(result, *arguments)."""
        def both(*args, **more):
            out = original(*args, **more)
            if not self.muted:
                self.measured(look, out, *args, *more.values())
            return out

        original = self.replace(owner, name, both)

    def draft_layer(self, owner: object, name: str) -> None:
        """owner.name runs as it always does; nothing in it is taken for the model's, and its time is its own."""
        def look(*args, **more):
            started, self.drafting = self.clock(), True
            try:
                return original(*args, **more)
            finally:
                self.drafting = False
                self.add_time("draft layer", started)

        original = self.replace(owner, name, look)

    def replace(self, owner: object, name: str, function: Callable) -> Callable:
        """Put a function in the place of owner.name until the end; return the one that was there."""
        if not callable(original := getattr(owner, name, None)):
            raise AttributeError(f"X-ray listens to {name} of {getattr(owner, '__name__', type(owner).__name__)}, "
                                 "which is not there: was it renamed?")
        own = vars(owner).get(name)  # a module's function; a method stands in the class
        self.stack.callback(lambda: setattr(owner, name, own) if own is not None else delattr(owner, name))
        setattr(owner, name, function)
        return original

    # -- time ---------------------------------------------------------------------------------------------------------

    def clock(self) -> float:
        """Seconds so far without the recorder's own; a GPU is waited for, since it runs on its own."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter() - self.own

    def measured(self, look: Callable, *args) -> None:
        begin = time.perf_counter()
        look(*args)
        self.own += time.perf_counter() - begin

    def add_time(self, part: str, started: float) -> None:
        spent = self.clock() - started
        self.seconds[part, self.phase] = self.seconds.get((part, self.phase), 0.0) + spent
        if part == "router":  # which is inside the experts
            self.seconds["experts", self.phase] = self.seconds.get(("experts", self.phase), 0.0) - spent

    def end_phase(self) -> None:
        """The prompt's time ends with the first token that is chosen, the answer's with the run."""
        self.total[self.phase] = self.clock() - self.began - sum(self.total.values())
        self.phase = "answer"
