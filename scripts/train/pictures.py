"""The pictures of the lesson, from real small runs: uv run python -m scripts.train.pictures

What the runs gave is kept in pictures/numbers.json, and --draw draws the pictures again from there in a second.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from .draw import DRAW
from .show import thin

FOLDER = Path(__file__).parent / "pictures"
NUMBERS = FOLDER / "numbers.json"
LARGEST = 100.0  # a loss in nats: exp(100) is more tokens than there are


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.train.pictures", allow_abbrev=False,
                                     description="Make the pictures of scripts/train/README.md from small runs.")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE",
                        help=f"{', '.join(DRAW)}; default: all. Each takes up to four minutes on one core, "
                        "except loss: it is not trained here, see --losses")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--draw", action="store_true", help="train nothing, draw from the numbers that are kept")
    instead.add_argument("--losses", type=Path, metavar="FILE",
                         help="draw loss.svg alone, from a whole run's losses: a JSON list of numbers")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.pictures if name not in DRAW]
    if unknown:
        parser.error(f"no picture {unknown[0][:40]!r}: choose from {', '.join(DRAW)}")
    if arguments.losses and arguments.pictures:
        parser.error("--losses draws loss.svg alone: name no picture")
    if "loss" in arguments.pictures and not arguments.draw:
        parser.error("loss.svg shows a whole run: give its losses with --losses FILE, or draw it with --draw")
    return arguments


def read_losses(path: Path) -> list[float]:
    """A JSON list of losses, one a step. Raises FileNotFoundError or ValueError."""
    try:
        losses = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}; --losses takes a JSON list of numbers") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON; --losses takes a list of numbers, one a step") from None
    if not isinstance(losses, list) or len(losses) < 2 or not all(
            isinstance(loss, int | float) and not isinstance(loss, bool) and 0 <= loss < LARGEST for loss in losses):
        raise ValueError(f"{path}: --losses takes a JSON list of two or more numbers, one a step, "
                         f"each from 0 to under {LARGEST:g}")
    return losses


def whole_run(losses: list[float]) -> dict:
    """At most 300 means of neighbors, the first loss, and the mean of the last ones, in which single batches differ."""
    def short(loss: float) -> float:
        return float(f"{max(loss, 1e-5):.4g}")  # the scale is logarithmic

    end = losses[-20:]
    return {"steps": len(losses), "first": short(losses[0]), "last": short(sum(end) / len(end)),
            "losses": [short(loss) for loss in thin(losses, 300)]}


def read_numbers() -> dict:
    return json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}


def keep(name: str, found: dict) -> None:
    """One picture's numbers a line, so that a diff shows which have changed."""
    numbers = read_numbers() | {name: found}
    lines = [f"{json.dumps(each)}: {json.dumps(numbers[each], ensure_ascii=False)}" for each in DRAW if each in numbers]
    FOLDER.mkdir(exist_ok=True)
    NUMBERS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    names = arguments.pictures or list(DRAW)
    try:
        if arguments.losses:
            names = ["loss"]
            keep("loss", whole_run(read_losses(arguments.losses)))
        elif not arguments.draw:
            from .small_runs import MEASURE  # after parse, so that --help does not wait for torch

            for name in [name for name in names if name in MEASURE]:
                print(f"{name}:", flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    keep(name, MEASURE[name](Path(folder)))
        numbers = read_numbers()
        missing = [name for name in arguments.pictures if name not in numbers]
        if missing:
            raise ValueError(f"{NUMBERS.name} has no numbers for {missing[0]}: run without --draw")
        for name in [name for name in names if name in numbers]:
            (FOLDER / f"{name}.svg").write_text(DRAW[name](numbers[name]), encoding="utf-8", newline="\n")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"pictures: {str(error)[:290]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
