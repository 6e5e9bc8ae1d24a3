"""Exercises of the lesson: write the loss, the training step and the balance loss yourself, and have them checked.

    uv run python -m scripts.train.practice                            writes practice/train.py, to be filled in
    uv run python -m scripts.train.practice --check                    says of each function whether it is right
    uv run python -m scripts.train.practice --check next_token_loss
"""

import argparse
import sys
import traceback
from pathlib import Path
from types import ModuleType

FILE = Path(__file__).resolve().parents[2] / "practice" / "train.py"
NAMES = ("next_token_loss", "training_step", "balance_loss")
COMMAND = "uv run python -m scripts.train.practice"

STUBS = '''\
"""Exercises of scripts/train/README.md. Replace each `raise NotImplementedError`, in any order, and check:

    uv run python -m scripts.train.practice --check
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats: the mean of -ln p(target).                                    (section 4, 15 minutes)

    logits   (B, T, V), float: the scores as the model gives them; the softmax is still to be taken
    targets  (B, T), int64: the token that follows each position, or -100 where the position is no target

    Returns a tensor without dimensions. Positions with -100 count neither in the sum nor in the number that it is
    divided by; at least one position has a target. Scores may be as large as 1,000, and the result stays finite.
    Gradients flow to the logits, and the two inputs are not changed.
    To be written without cross_entropy and nll_loss; log_softmax and logsumexp may be used.
    """
    raise NotImplementedError


def training_step(model: nn.Module, ids: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step of training on one batch.                                                  (section 7, 10 minutes)

    model      gives logits (B, T, V) for ids (B, T)
    ids        (B, T), int64
    targets    (B, T), int64, with -100 as above
    optimizer  holds the model's parameters; their gradients may be left over from the step before

    Returns the loss before the weights moved, as a Python float. The loss is that of next_token_loss above
    (F.cross_entropy may be used here). Gradients are of this batch alone. Their length, over all parameters
    together, is cut to at most 1 (torch.nn.utils.clip_grad_norm_) before the optimizer moves the weights.
    """
    raise NotImplementedError


def balance_loss(probabilities: Tensor, topk_ids: Tensor) -> Tensor:
    """E times the sum over the experts of f_e · P_e.                                      (section 9, 10 minutes)

    probabilities  (n, E), float: the router's softmax over all E experts, for each of n tokens
    topk_ids       (n, A), int64: the A experts that each token was sent to

    f_e is the share of all n·A choices that fell on expert e; an expert that nobody chose has 0. P_e is the mean
    of the probability of expert e over the n tokens. Returns a tensor without dimensions: 1 where all experts are
    used equally. Gradients flow to the probabilities.
    """
    raise NotImplementedError
'''


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.train.practice", allow_abbrev=False,
                                     description="Exercises of scripts/train/README.md: write them, or check them.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", nargs="?", const="all", choices=("all", *NAMES), metavar="NAME",
                      help=f"check all functions, or one of {', '.join(NAMES)}; exit code 1 where one is not right")
    what.add_argument("--restart", action="store_true", help="write the file anew; the old one becomes train.old.py")
    return parser.parse_args(words)


def shown(path: Path) -> str:
    """As short as it can be typed."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def write(path: Path, restart: bool) -> None:
    """The stubs; what a learner has written is never lost."""
    if path.exists() and not restart:
        raise FileExistsError(f"{shown(path)} is there and stays as it is; --check looks at it, --restart begins anew")
    if path.exists():
        path.replace(path.with_suffix(".old.py"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STUBS, encoding="utf-8")
    print(f"{shown(path)} is written: fill in {', '.join(NAMES)}, then\n  {COMMAND} --check")


def load(path: Path) -> ModuleType:
    """The learner's file as a module. ValueError in one sentence where Python cannot run it."""
    if not path.is_file():
        raise FileNotFoundError(f"{shown(path)} is not there yet: {COMMAND} writes it")
    module = ModuleType(path.stem)
    try:
        exec(compile(path.read_text(encoding="utf-8-sig"), str(path), "exec"), module.__dict__)
    except SyntaxError as error:
        raise ValueError(f"{shown(path)}, line {error.lineno}: Python cannot read this line ({error.msg})") from None
    except (Exception, SystemExit) as error:  # whatever a learner's file does
        raise ValueError(f"{shown(path)}{line_of(error, path)}: {type(error).__name__}: {str(error)[:120]}") from None
    return module


def line_of(error: BaseException, path: Path) -> str:
    """", line 12": the last line of the learner's file that was running."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def verdict(module: ModuleType, name: str, path: Path) -> str:
    """"right", or one sentence that says what is not."""
    from . import checks  # after parse, so that --help does not wait for torch

    function = getattr(module, name, None)
    if not callable(function):
        return f"there is no function {name} in the file"
    try:
        checks.CHECKS[name](function)
        return "right"
    except checks.Off as off:
        return str(off)
    except NotImplementedError:
        return "not written yet"
    except (Exception, SystemExit) as error:  # whatever a learner's function does
        return checks.sentence_of(error, name) + line_of(error, path)


def main(words: list[str] | None = None, path: Path = FILE) -> int:
    arguments = parse(words)
    try:
        if not arguments.check:
            write(path, arguments.restart)
            return 0
        module = load(path)
        names = NAMES if arguments.check == "all" else (arguments.check,)
        verdicts = []
        for name in names:
            verdicts.append(verdict(module, name, path))
            print(f"{name:16} {verdicts[-1]}", flush=True)
    except ModuleNotFoundError as error:
        print(f"practice: {error}; `uv run python -m scripts.train.practice` installs what it needs", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"practice: {error}", file=sys.stderr)
        return 2
    print(f"{verdicts.count('right')} of {len(names)} right")
    return 0 if set(verdicts) == {"right"} else 1


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = 130
    sys.exit(code)
