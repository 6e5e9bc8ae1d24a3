"""Is a learner's function right, and if not, what is wrong with it, in one sentence.

The function runs on several inputs beside the real one. Where results differ, they are compared with those of the
usual mistakes, one at a time and then several: each exercise has one function `wrong(inputs, **options)` that
computes the right result by default, and a wrong one for each option. The mistake that fits in every case is named.
Where none fits, the first difference is shown.
"""

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from .graft import Off, line_of, one_line

PATIENCE = 2.0  # seconds of looking for three mistakes at the same time
LOW = (torch.bfloat16, torch.float16)


class NotWritten(Exception):
    """The exercise is as it was."""


@dataclass
class Case:
    """One input. `tags` say in words what is special about it; `strict`: low precision has to round as wanted."""

    inputs: dict
    tags: tuple[str, ...] = ()
    strict: bool = False

    def copy(self) -> SimpleNamespace:
        return SimpleNamespace(**{name: clone(value) for name, value in self.inputs.items()})

    def label(self) -> str:
        """"x (2, 5, 8)": the shapes of its tensors."""
        parts = []
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.ndim > 1 and not name.startswith("_"):
                low = f" {str(value.dtype).removeprefix('torch.')}" if value.dtype in LOW else ""
                parts.append(f"{name} {tuple(value.shape)}{low}")
            elif isinstance(value, int | float | None) and not isinstance(value, bool) and not name.startswith("_"):
                parts.append(f"{name} {value}")
        return ", ".join(parts[:3])


@dataclass
class Check:
    """What the checks_* modules give for each exercise."""

    cases: Callable[[], list[Case]]
    run: Callable[[ModuleType, SimpleNamespace], object]  # calls the function of a module, real or grafted
    wrong: Callable[..., object] | None = None  # (inputs, **options)
    mistakes: list[tuple[dict, str]] = field(default_factory=list)
    results: tuple[str, ...] = ("the result",)
    shape: str = ""  # of the result, in letters
    probe: Callable[[ModuleType], str | None] | None = None  # where numbers are wrong: one sentence more
    after: Callable[[ModuleType], str | None] | None = None  # where all numbers are right: what may still be wrong
    gradient: bool = True  # whether gradients flow through it
    explain: Callable[[object, object, Case], str | None] | None = None  # first difference in words of its own
    errors: dict[str, str] = field(default_factory=dict)  # part of an error's message -> sentence
    wanted: Callable[[SimpleNamespace], object] | None = None  # the right result; None: what the real function gives
    alike: Callable[[object, object], bool] | None = None  # in place of `same`, where chance plays a part

    def same(self, a: object, b: object, strict: bool = False) -> bool:
        return self.alike(a, b) if self.alike else same(a, b, strict)


@dataclass
class Raised:
    """An error in the place of a result."""

    error: BaseException

    def like(self, other: object, wanted: object) -> bool:
        """The same error; where a refusal is wanted, or the other has no words, these may be any."""
        return isinstance(other, Raised) and type(self.error) is type(other.error) and (
            isinstance(wanted, Raised) or one_line(other.error) in ("", one_line(self.error)))


def clone(value):
    """Tensors are copied, and what holds them; anything else is handed on."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(clone(part) for part in value)
    if isinstance(value, dict):
        return {key: clone(part) for key, part in value.items()}
    return value


def changed(before: dict, after: SimpleNamespace) -> str | None:
    """The name of an input that was written to."""
    for name, value in before.items():
        if not unchanged(value, getattr(after, name)):
            return name.lstrip("_")
    return None


def unchanged(a, b) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(), b.detach().nan_to_num())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(unchanged(x, y) for x, y in zip(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(unchanged(a[key], b[key]) for key in a)
    return a == b if isinstance(a, str | int | float) else True


def close(a: Tensor, b: Tensor, strict: bool = False) -> bool:
    """Shape, type and numbers; b is what is wanted."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.device.type == "meta" or b.device.type == "meta":
        return a.device == b.device
    if not b.is_floating_point():
        return torch.equal(a, b)
    if not b.numel():
        return True
    a, b = a.detach(), b.detach()
    finite = b[b.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 1.0
    if b.dtype in LOW:
        near = torch.isclose(a.double(), b.double(), 0.03, 0.02 * largest, equal_nan=True).all()
        same = ((a == b) | (a.isnan() & b.isnan())).double().mean()
        return bool(near) and (not strict or same > 0.98)
    return torch.allclose(a.double(), b.double(), 1e-4, 1e-5 * largest, equal_nan=True)


def same(a, b, strict: bool = False) -> bool:
    """b is what is wanted: a tensor, a number, a text, or several."""
    if isinstance(b, Tensor):
        return isinstance(a, Tensor) and close(a, b, strict)
    if isinstance(b, float):
        return isinstance(a, float | int) and not isinstance(a, bool) and (
            math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b)))
    if isinstance(b, list | tuple):
        return isinstance(a, list | tuple) and len(a) == len(b) and all(same(x, y, strict) for x, y in zip(a, b))
    return type(a) is type(b) and a == b


def attempt(function: Callable[[], object]) -> object:
    """Its result, or what it raised."""
    try:
        return function()
    except (Off, NotWritten, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a learner's function does: SystemExit, BdbQuit, GeneratorExit, …
        if isinstance(error, NotImplementedError) and "is still to be written" in str(error):
            raise NotWritten from None
        return Raised(error)


def judge(check: Check, module: ModuleType, real: ModuleType, path: Path) -> None:
    """Off in one sentence where the learner's function in `module` is not right, NotWritten where it is a stub."""
    cases, given, wanted = check.cases(), [], []
    with torch.no_grad():
        for case in cases:
            theirs = case.copy()
            given.append(attempt(lambda: check.run(module, theirs)))
            wanted.append(attempt(lambda: check.wanted(case.copy()) if check.wanted else check.run(real, case.copy())))
            if not isinstance(given[-1], Raised) and (name := changed(case.inputs, theirs)):
                a = "tensor instead of writing into that one" if isinstance(case.inputs.get(
                    name, case.inputs.get(f"_{name}")), Tensor) else "one and leave that as it is"
                raise Off(f"it changes {name}, which it was given: make a new {a}")
    good = [agrees(check, a, b, case) for a, b, case in zip(given, wanted, cases)]
    if all(good):
        if check.after and (sentence := check.after(module)):
            raise Off(sentence)
        if check.gradient:
            compare_gradients(check, module, real, cases[0], path)
        return
    tell_missing_return(given, wanted, check)
    sentence = usual_mistake(check, cases, given, wanted)
    raised = [isinstance(result, Raised) for result in given]
    if not sentence and any(raised):  # numbers that are there and wrong tell more than an error elsewhere
        there = [n for n, one in enumerate(raised) if not one]
        if sum(not good[n] for n in there) > 1:  # one alone would fit too many
            sentence = usual_mistake(check, *([row[n] for n in there] for row in (cases, given, wanted)), most=2)
        for n, result in enumerate(given if not sentence else ()):
            if raised[n] and not good[n]:
                tell_usual_errors(result, check, path)
    exact = [n for n, case in enumerate(cases) if not case.strict]
    if not sentence and len(exact) < len(cases) and not all(good[n] for n in exact):  # rounding is looked at later
        sentence = usual_mistake(check, *([row[n] for n in exact] for row in (cases, given, wanted)), most=2)
    more = attempt(lambda: check.probe(module)) if check.probe else None
    if isinstance(more, str):
        raise Off(f"{more}: {sentence}" if sentence else more)
    if sentence:
        raise Off(sentence)
    raise Off(difference(check, cases, given, wanted, good, path))


def agrees(check: Check, given: object, wanted: object, case: Case) -> bool:
    if isinstance(wanted, Raised):  # a refusal is wanted, in whatever words
        return isinstance(given, Raised) and type(given.error) is type(wanted.error)
    return not isinstance(given, Raised) and check.same(given, wanted, case.strict)


def tell_usual_errors(raised: Raised, check: Check, path: Path) -> None:
    """Raises Off with a sentence for an error that beginners meet; else nothing happens."""
    message, where = f"{type(raised.error).__name__}: {raised.error}", line_of(raised.error, path)
    for part, sentence in check.errors.items():
        if part in message:
            raise Off(f"{path.name}{where}: {sentence}" if where else sentence)
    if type(raised.error).__name__ == "BdbQuit":
        raise Off(f"{path.name}{where}: breakpoint() stops here; the check has no keyboard, so take it out")
    if isinstance(raised.error, SystemExit):
        raise Off(f"{path.name}{where}: it ends the program (exit); let it return its result instead")
    if isinstance(raised.error, EOFError):
        raise Off(f"{path.name}{where}: input() waits for a keyboard, and the check has none")
    if isinstance(raised.error, RecursionError):
        raise Off(f"{path.name}{where}: it calls itself without an end (RecursionError)")
    if isinstance(raised.error, MemoryError):
        raise Off(f"{path.name}{where}: it wants more memory than there is")


def tell_missing_return(given: list, wanted: list, check: Check) -> None:
    for a, b in zip(given, wanted):
        if a is None and not isinstance(b, Raised) and b is not None:
            raise Off("it returns nothing: the last line has to be `return …`")
        if isinstance(a, Raised) or isinstance(b, Raised):
            continue
        if isinstance(b, list | tuple) and isinstance(a, Tensor) and len(b) > 1:
            raise Off(f"it returns one tensor, wanted are {len(b)} results: {' and '.join(check.results)}")
        if type(a).__name__ in ("generator", "coroutine", "function", "method"):
            raise Off(f"it returns a {type(a).__name__}, wanted is {kind(b, check)}")


def kind(value: object, check: Check) -> str:
    if isinstance(value, Tensor):
        if not value.ndim:
            return "a tensor without dimensions, ()"
        letters = f" {check.shape} =" if check.shape else ""
        return f"a tensor{letters} {tuple(value.shape)}"
    return {"float": "a Python float", "int": "an int"}.get(type(value).__name__, f"a {type(value).__name__}")


def usual_mistake(check: Check, cases: list[Case], given: list, wanted: list, most: int = 3) -> str | None:
    """The sentence of the mistake, or of up to `most` together, that gives the learner's results in every case."""
    def fits(options: dict) -> bool:
        for case, result, right in zip(cases, given, wanted):
            try:
                theirs = check.wrong(case.copy(), **options)
            except Exception as error:
                theirs = Raised(error)
            alike = result.like(theirs, right) if isinstance(result, Raised) else (
                not isinstance(theirs, Raised) and check.same(result, theirs, case.strict))
            if not alike:
                return False
        return True

    if check.wrong is None:
        return None
    began = time.monotonic()
    with torch.no_grad():
        for together in range(1, most + 1):
            for several in itertools.combinations(check.mistakes, together):
                if together == 3 and time.monotonic() - began > PATIENCE:
                    return None
                options = {key: value for one, _ in several for key, value in one.items()}
                if len(options) == sum(len(one) for one, _ in several) and fits(options):
                    return "; and ".join(sentence for _, sentence in several)
    return None


def difference(check: Check, cases: list[Case], given: list, wanted: list, good: list[bool], path: Path) -> str:
    """What no usual mistake explains: the first case that is wrong, and the first number in it."""
    number = good.index(False)
    case, a, b = cases[number], given[number], wanted[number]
    bad = [case for case, right in zip(cases, good) if not right]
    special = [tag for tag in case.tags if all(tag in one.tags for one in bad)
               and not any(tag in one.tags for one, right in zip(cases, good) if right)]
    only = f"only wrong {special[0]}: " if special and any(good) else ""
    label = case.label()
    if isinstance(a, Raised):
        where = f"{path.name}{line_of(a.error, path)}: "
        if isinstance(b, Raised):
            return f"{only}{where}it raises {type(a.error).__name__}, wanted is {type(b.error).__name__}"
        return f"{only}{where}{type(a.error).__name__}: {one_line(a.error)}" + (f" ({label})" if label else "")
    if isinstance(b, Raised):
        return f"{only}it has to raise {type(b.error).__name__} where {one_line(b.error)}, and returns instead"
    if check.explain and (sentence := check.explain(a, b, case)):
        return only + sentence
    if isinstance(b, list | tuple):
        if not isinstance(a, list | tuple):
            return f"{only}it returns a {type(a).__name__}, wanted are {len(b)}: {' and '.join(check.results)}"
        if len(a) != len(b):
            return f"{only}it returns {len(a)} results, wanted are {len(b)}: {' and '.join(check.results)}"
        place = next(n for n, (x, y) in enumerate(zip(a, b)) if not same(x, y, case.strict))
        name = check.results[place] if place < len(check.results) else "the result"
        return only + between(name, a[place], b[place], check, case, label)
    pairs = [(x, y) for x, y, right in zip(given, wanted, good) if not right]
    if factor := common_factor(pairs):
        return f"{only}all numbers are {factor:.3g} times what they should be (for {label})"
    return only + between(check.results[0], a, b, check, case, label)


def common_factor(pairs: list[tuple]) -> float | None:
    """Of the first case, where every case has one."""
    factors = []
    for a, b in pairs:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and b.is_floating_point()
                and a.is_floating_point() and b.numel() > 1):
            return None
        factor = float((a.double() * b.double()).sum() / b.double().square().sum().clamp(min=1e-30))
        if not math.isfinite(factor) or abs(factor) < 1e-6 or not close(a, (factor * b.double()).to(a.dtype)):
            return None
        factors.append(factor)
    return factors[0] if factors and abs(factors[0] - 1) > 1e-4 else None


def between(name: str, a: object, b: object, check: Check, case: Case, label: str) -> str:
    """One result against the wanted one."""
    given = f" (for {label})" if label else ""
    if not isinstance(b, Tensor):
        if type(a) is not type(b) and not (isinstance(a, int | float) and isinstance(b, float)):
            a_kind = f"a tensor {tuple(a.shape)}" if isinstance(a, Tensor) else type(a).__name__
            return f"{name} is {a_kind}, wanted is {kind(b, check)}{given}"
        return f"{name} {is_not(a, b)}{given}"
    if not isinstance(a, Tensor):
        return f"{name} is {type(a).__name__}, wanted is {kind(b, check)}{given}"
    if a.shape != b.shape:
        if sentence := other_order(a, b, case):
            return f"{name}: {sentence}{given}"
        return f"the shape of {name} is {tuple(a.shape)}, wanted is {check.shape} {tuple(b.shape)}{given}".replace(
            "is  (", "is (")
    if a.dtype != b.dtype:
        kinds = str(a.dtype).removeprefix("torch."), str(b.dtype).removeprefix("torch.")
        return f"the type of {name} is {kinds[0]}, wanted is {kinds[1]}{given}"
    if a.device != b.device:
        return f"{name} is on device {a.device}, wanted is {b.device}{given}"
    if sentence := other_order(a, b, case):
        return f"{name}: {sentence}{given}"
    return first_number(name, a, b, case.strict) + given


def other_order(a: Tensor, b: Tensor, case: Case) -> str | None:
    """The right numbers with axes exchanged, or cut into another shape."""
    if a.numel() != b.numel() or a.dtype != b.dtype:
        return None
    if a.ndim == b.ndim <= 5:
        for order in itertools.permutations(range(a.ndim)):
            if order != tuple(range(a.ndim)) and a.permute(order).shape == b.shape and close(a.permute(order), b,
                                                                                             case.strict):
                axes = [n for n, axis in enumerate(order) if n != axis]
                what = f"{axes[0]} and {axes[1]}" if len(axes) == 2 else ", ".join(map(str, axes))
                return f"the right numbers with axes {what} exchanged: {tuple(a.shape)}, wanted is {tuple(b.shape)}"
    if a.shape != b.shape and close(a.reshape(b.shape), b, case.strict):
        return f"the right numbers in shape {tuple(a.shape)}, wanted is {tuple(b.shape)}"
    return None


def first_number(name: str, a: Tensor, b: Tensor, strict: bool) -> str:
    """In words, the first number of `a` that is not that of `b`; both have one shape, and they differ."""
    if b.is_floating_point():
        x, y = a.double(), b.double()
        largest = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 1.0
        low = b.dtype in LOW
        off = (a != b) if low and strict else ~torch.isclose(x, y, 0.03 if low else 1e-4,
                                                              (0.02 if low else 1e-5) * largest, equal_nan=True)
        if strict and low and torch.isclose(x, y, 0.03, 0.02 * largest, equal_nan=True).all():
            return (f"{name} is rounded otherwise: {off.double().mean():.0%} of the {b.dtype} numbers differ in the "
                    "last digit").replace("torch.", "")
    else:
        off = a != b
    place = tuple(off.nonzero()[0].tolist()) if off.any() else ()
    where = f"[{', '.join(map(str, place))}]" if place else ""
    return f"{name}{where} {is_not(a[place].item(), b[place].item())}"


def is_not(a: object, b: object) -> str:
    """"is 0.145, right is 0.146": in three digits, or as many as it takes to tell them apart."""
    if not (isinstance(a, float) and isinstance(b, float)):
        return f"is {a!r:.80}, right is {b!r:.80}"
    digits = next((digits for digits in range(3, 10) if f"{a:.{digits}g}" != f"{b:.{digits}g}"), 3)
    return f"is {a:.{digits}g}, right is {b:.{digits}g}"


def compare_gradients(check: Check, module: ModuleType, real: ModuleType, case: Case, path: Path) -> None:
    """Training goes through it: the gradients of all inputs are those of the real one."""
    found = []
    for one in (module, real):
        inputs = case.copy()
        leaves = {name: value.requires_grad_() for name, value in vars(inputs).items()
                  if isinstance(value, Tensor) and value.is_floating_point()}
        result = attempt(lambda: check.run(one, inputs))
        if isinstance(result, Raised):
            if "in-place operation" in str(result.error):
                raise Off(f"{path.name}{line_of(result.error, path)}: it writes into a tensor that the gradient needs; "
                          "make a new one")
            raise Off(f"with gradients, {path.name}{line_of(result.error, path)}: {type(result.error).__name__}: "
                      f"{one_line(result.error)}")
        result = [part for part in (result if isinstance(result, list | tuple) else [result])
                  if isinstance(part, Tensor) and part.is_floating_point()]
        if not result:
            return
        if not any(part.requires_grad for part in result):
            found.append(None)
            continue
        weights = [torch.linspace(-1, 1, part.numel()).view(part.shape) for part in result]
        total = sum((part.float() * weight).sum() for part, weight in zip(result, weights))
        total.backward()
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    theirs, ours = found
    if ours is None:
        return
    if theirs is None:
        raise Off("the numbers are right, and no gradient flows: .item(), .detach(), .data, torch.no_grad() or a new "
                  "torch.tensor cuts it off")
    for name, gradient in ours.items():
        if gradient.abs().max() > 1e-7 and (name not in theirs or not torch.allclose(
                theirs[name], gradient, 1e-3, 1e-4 * gradient.abs().max().item())):
            raise Off(f"the numbers are right, and the gradient for {name.lstrip('_')} is not: .detach(), .data, "
                      ".item() or torch.no_grad() cuts a part of it off")


# --- for the checks ---

def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed)) * scale).to(dtype)


def fill(module: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights by name: norms around 1, matrices so that a result is about as large as the input."""
    generator = torch.Generator().manual_seed(2000 + seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            numbers = 1 + 0.4 * torch.randn(parameter.shape, generator=generator)
        else:
            numbers = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
        parameter.data = numbers.to(dtype)
    return module.eval()
