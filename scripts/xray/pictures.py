"""The pictures that the lessons show, from real runs in float32: uv run python -m scripts.xray.pictures

What the runs gave is kept in pictures/numbers.json, and --draw draws the pictures again from there in a second.
"""

import argparse
import json
import sys
from pathlib import Path

from . import drawings, lesson_deepseek_v3, lesson_qwen3, lesson_qwen3_moe, lesson_root

DRAW = (drawings.DRAW | lesson_qwen3.DRAW | lesson_qwen3_moe.DRAW | lesson_deepseek_v3.DRAW
        | lesson_root.DRAW)
FOLDER = Path(__file__).parent / "pictures"
NUMBERS = FOLDER / "numbers.json"
LARGEST = 60_000  # bytes of a picture


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.xray.pictures", allow_abbrev=False,
                                     description="Make the pictures of the lessons from runs of the embedded models.")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"{', '.join(DRAW)}; default: all")
    parser.add_argument("--draw", action="store_true", help="run no model, draw from the numbers that are kept")
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


def measures() -> dict:
    """Picture -> the run that gives its numbers. Called after parse, so that --help does not wait for torch."""
    from . import examples, measure_root

    return examples.MEASURE | measure_root.MEASURE


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    names = arguments.pictures or list(DRAW)
    try:
        if not arguments.draw:
            measure = measures()
            for name in names:
                print(f"{name}:", flush=True)
                keep(name, measure[name]())
        numbers = read_numbers()
        missing = [name for name in arguments.pictures if name not in numbers]
        if missing:
            raise ValueError(f"{NUMBERS.name} has no numbers for {missing[0]}: run without --draw")
        for name in [name for name in names if name in numbers]:
            text = DRAW[name](numbers[name])
            if len(text.encode()) > LARGEST:
                raise ValueError(f"{name}.svg would have {len(text.encode()):,} bytes, more than {LARGEST:,}")
            (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8", newline="\n")
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
