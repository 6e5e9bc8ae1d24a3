"""Train a small model from nothing, or fine-tune a checkpoint: uv run python -m scripts.train qwen3 --minutes 10

Without --data it learns what the embedded checkpoints know: a glossary of language models, small talk, and sums. Every
minute it answers the same three questions. Ctrl-C stops it, and the same command goes on where it stopped.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from .configs import KINDS, STEPS

ROOT = Path(__file__).resolve().parents[2]


def number(kind: type, least: float, what: str):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < 10**9:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what}")
        return value
    return parse


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.train", allow_abbrev=False,
                                     description="Train a small model from nothing, or fine-tune a checkpoint.")
    add, positive = parser.add_argument, number(int, 1, "a whole number above 0")
    add("package", choices=KINDS)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=number(float, 0.1, "a time of 0.1 minutes or more"), metavar="M",
                        help="about how long; default 10. The first steps are timed; then the number of steps is fixed")
    length.add_argument("--steps", type=positive, metavar="N",
                        help="instead of --minutes; a full run: "
                             + ", ".join(f"{steps} ({package})" for package, steps in STEPS.items()))
    add("--output", type=Path, metavar="FOLDER", help="default: checkpoints/my- and the model's name")
    add("--replace", action="store_true", help="write over a checkpoint that is there")
    add("--restart", action="store_true", help="begin anew where an unfinished training would go on")
    add("--seed", type=number(int, 0, "a whole number"), default=20, metavar="N", help="default 20")
    add("--data", type=Path, metavar="FILE",
        help='train on your own: JSON lines {"question": …, "answer": …}, or a plain text')
    add("--from", dest="source", metavar="NAME_OR_FOLDER", help="start from this checkpoint, not from random weights")
    add("--lora", type=positive, metavar="RANK",
        help="with --from: train only two narrow matrices beside each linear layer")
    add("--rate", type=number(float, 1e-9, "a rate above 0"), metavar="R",
        help="learning rate; default 5e-3 (deepseek_v3 4e-3) from nothing, less with --from")
    add("--tokens", type=number(int, 16, "a whole number of 16 or more"), metavar="N",
        help="tokens of one step; default 4096, with --from 1024, with --lora 512")
    add("--compile", dest="compiled", action="store_true",
        help="torch.compile the layers, of a mixture all but the experts: faster, after a minute; needs a C++ compiler")
    add("-d", "--device", default="cpu", help="default cpu; a GPU, such as cuda, is faster for real checkpoints")
    add("--threads", type=positive, metavar="N", help="default: PyTorch's choice")
    add("--evaluate-only", action="store_true", help="measure the embedded checkpoint, or the one in --output")
    return parser.parse_args(words)


def find_source(arguments: argparse.Namespace) -> Path | None:
    if arguments.source is None:
        return None
    main = importlib.import_module(f"{arguments.package}.main")
    folder, _ = main.find_checkpoint(arguments.source, main.CHECKPOINTS, main.DEFAULT, main.EMBEDDED, main.DOWNLOAD)
    return folder


def train(arguments: argparse.Namespace) -> int:
    from . import learn, task

    name = KINDS[arguments.package][0]
    folder = arguments.output or ROOT / "checkpoints" / f"my-{name}"
    source = find_source(arguments)
    importlib.import_module(f"{arguments.package}.engine.memory").find_device(arguments.device)
    if arguments.lora and not source:
        raise ValueError("--lora changes a checkpoint that is there: name it with --from")
    if source and not arguments.data:
        raise ValueError("--from needs --data FILE: what the checkpoint is to learn")
    if source and source.resolve() == folder.resolve():
        raise ValueError(f"{folder} is the checkpoint to start from: name another folder with --output")
    plan = task.Plan(
        arguments.package, None if arguments.steps else arguments.minutes or 10.0, arguments.steps, arguments.seed,
        arguments.data and str(arguments.data), task.digest(arguments.data), source and str(source), arguments.lora,
        arguments.rate, arguments.tokens or (512 if arguments.lora else 1024 if source else 4096), arguments.compiled,
        arguments.threads or learn.torch.get_num_threads(), arguments.device)
    return learn.learn(plan, folder, arguments.replace, arguments.restart)


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    try:
        if arguments.evaluate_only:
            from .evaluate import show_table  # after parse, so that --help does not wait for torch

            show_table(arguments.package, arguments.output or ROOT / "checkpoints" / KINDS[arguments.package][0])
            return 0
        return train(arguments)
    except ModuleNotFoundError as error:
        print(f"train: {error}; `uv run python -m scripts.train` installs what it needs", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        sentence, *_ = str(error).strip().splitlines() or [type(error).__name__]
        print(f"train: {sentence[:290]}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
