"""The pictures of this folder's page, from the embedded models: uv run python -m scripts.quantize.pictures

What was measured is kept in pictures/numbers.json, and --draw draws the pictures again from there in a second.
"""

import argparse
import json
import sys
from pathlib import Path

from .drawings import DRAW

FOLDER = Path(__file__).parent / "pictures"
NUMBERS = FOLDER / "numbers.json"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.quantize.pictures", allow_abbrev=False,
                                     description="Make the pictures of scripts/quantize/README.md: round the embedded "
                                                 "models, and ask them.")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE",
                        help=f"{', '.join(DRAW)}; default: all. answers takes some minutes on one core")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw from the numbers that are kept")
    arguments = parser.parse_args(words)
    unknown = [name for name in arguments.pictures if name not in DRAW]
    if unknown:
        parser.error(f"no picture {unknown[0][:40]!r}: choose from {', '.join(DRAW)}")
    return arguments


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
        if not arguments.draw:
            from .measure import MEASURE  # after parse, so that --help does not wait for torch

            for name in names:
                print(f"{name}:", flush=True)
                keep(name, MEASURE[name]())
        numbers = read_numbers()
        missing = [name for name in arguments.pictures if name not in numbers]
        if missing:
            raise ValueError(f"{NUMBERS.name} has no numbers for {missing[0]}: run without --draw")
        for name in [name for name in names if name in numbers]:
            (FOLDER / f"{name}.svg").write_text(DRAW[name](numbers[name]), encoding="utf-8", newline="\n")
    except (ValueError, OSError) as error:
        print(f"pictures: {str(error)[:290]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
