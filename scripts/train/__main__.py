"""Train the embedded checkpoints: uv run python -m scripts.train qwen3 | qwen3_moe | deepseek_v3

They are real models, a thousandth of the published size. They learn the glossary and small talk of corpus.py, and sums
of numbers up to three digits, answered directly or digit by digit in a think block. Everything is made here from one
seed: the conversations, the byte-level BPE, the weights. One sum in ten and some ways to ask are held out of training;
the accuracy on those is printed at the end.
"""

import argparse
import sys
from pathlib import Path

from .configs import KINDS, STEPS

ROOT = Path(__file__).resolve().parents[2]


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.train", description="Train an embedded checkpoint.")
    parser.add_argument("package", choices=KINDS)
    parser.add_argument("--output", type=Path, help="folder to write; default: checkpoints/ and the model's name")
    parser.add_argument("--steps", type=int, help=f"default {STEPS}")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint that is there")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    folder = arguments.output or ROOT / "checkpoints" / KINDS[arguments.package][0]
    try:
        from .evaluate import evaluate  # after parse, so that --help does not wait for torch
        from .training import make

        if not arguments.evaluate_only:
            make(arguments.package, folder, arguments.steps)
        for what, right in evaluate(arguments.package, folder).items():
            print(f"{right:7.2%}  {what}")
        return 0
    except ModuleNotFoundError as error:
        print(f"train: {error}; `uv run python -m scripts.train` installs what it needs", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:  # such as --evaluate-only without a checkpoint
        print(f"train: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
