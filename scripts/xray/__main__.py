"""X-ray: how a model came to each token of its answer, recorded from the real run.

    uv run python -m scripts.xray -p "What is 347 + 586?" -o sum.html        a page, to open in a browser
    uv run python -m scripts.xray -p "What is 347 + 586?"                    a part of it, in the terminal

The package follows from the checkpoint, and every other flag is its program's own: -n, -t, -k, --seed, --dtype, -d,
--thinking, --speculative, … (python -m qwen3.main --help lists them). Layers, heads, experts and tokens count from 0.
"""

import argparse
import re
import sys
from pathlib import Path

from qwen3.engine import terminal

if __name__ == "__main__":  # importing torch takes seconds, and Ctrl-C should leave quietly then too
    terminal.start()


def token_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no range of tokens such as 100-131; they count from 0, and "
                                         "nobody chooses the first")
    return first, last


def parse(words: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(The flags of this program, all others for the package's)."""
    parser = argparse.ArgumentParser(prog="python -m scripts.xray", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-m", "--model", metavar="NAME_OR_FOLDER", help="a name under checkpoints/ or a folder; default: qwen3's")
    add("-p", "--prompt", metavar="TEXT", help='the question; "-" reads standard input; default: the package\'s')
    add("-o", "--output", type=Path, metavar="FILE.html", help="write the page there; it replaces only an X-ray")
    add("--steps", type=token_range, metavar="A-B", help="show how the tokens A to B came about; default: all, or the "
        "first of the answer where a page has no room for all")
    add("--against", action="append", default=[], metavar="TEXT", help="compare with another question; repeatable")
    add("--without", action="append", default=[], metavar="PART", help="compare with the same run without a part, such "
        "as layer3.head2 or layer4.expert5, or several with commas between them; repeatable")
    add("--wrong-rope", action="store_true", help="compare with the same run, the rotary embedding turning other pairs")
    return parser.parse_known_args(words)


def main(words: list[str] | None = None) -> int:
    """0; 2 with one sentence about what the user can mend; 130 after Ctrl-C."""
    own, rest = parse(words)
    from .run import run  # only now, so that --help does not wait for torch

    try:
        run(own, rest, sys.argv[1:] if words is None else words)
        return 0
    except BrokenPipeError:  # whoever reads the answer has left, as `head` does
        return 0
    except KeyboardInterrupt:
        terminal.note()
        return 130
    except Exception as error:
        if (text := terminal.sentence(error)) is None:
            raise
        terminal.note(f"xray: {text}")
        return 2


if __name__ == "__main__":
    parse()  # --help ends here
    from . import run as _  # noqa: F401 torch, while Ctrl-C still leaves quietly
    terminal.program(main)
