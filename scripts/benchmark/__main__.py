"""Speed of a checkpoint against this machine's limits and, side by side, against a peer.

    uv run python -m scripts.benchmark            the default checkpoint of qwen3
    uv run --group reference python -m scripts.benchmark --shape qwen3-30b-a3b --layers 6 --against transformers
    uv run python -m scripts.benchmark --ranks 2            one model in two processes, which it starts itself

A shape is a published config with random weights, written under checkpoints/random/ the first time. Ours and the peer
run in processes of their own, in turn, so that both see the same machine. A disturbed measurement is repeated.
"""

import argparse
import sys
from pathlib import Path

from qwen3.engine import processes


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__.partition("\n")[0],
                                     allow_abbrev=False)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-m", "--model", metavar="NAME_OR_FOLDER", help="a name under checkpoints/ or a folder")
    which.add_argument("--shape", metavar="NAME", help="a published shape, random weights; `--shape list` names them")
    add("--layers", type=int, metavar="N", help="only the first N layers of the shape")
    add("--against", metavar="transformers|NAME",
        help="measure transformers with the same checkpoint as well, in turn (uv run --group reference); or, by the "
             "name or folder of another checkpoint, ours with that one")
    add("-d", "--device", help="default: cuda if there is one, else cpu")
    add("--threads", type=int, metavar="N", help="default: PyTorch's choice")
    add("--prefill", type=int, nargs="*", metavar="N", help="prompts of N tokens; default 512 and 4096, if they fit")
    add("--decode", type=int, nargs="*", metavar="N", help="tokens after N others; default 32 and 4096, if they fit")
    add("--rounds", type=int, default=3, metavar="N", help="default 3")
    add("--patience", type=float, default=60, metavar="SECONDS",
        help="wait so long, in all, for other programs to leave the machine alone; default 60")
    add("--compile", action="store_true", help="with torch.compile and static shapes")
    what = parser.add_mutually_exclusive_group().add_argument
    what("--plot", action="store_true", help="what a token costs as the context doubles, up to 32768 if it fits")
    what("--tricks", action="store_true", help="what each trick buys: ours against ours without it")
    what("--speculative", action="store_true", help="tokens a second with drafts and without (deepseek_v3)")
    what("--ranks", type=int, metavar="N",
         help="one model in N processes, each with a share of it, against one process, and the time in their sums")
    what("--batch", type=int, metavar="N",
         help="many prompts, N at a time: rows that are refilled, against slices that end with their longest answer")
    add("--answers", type=int, default=300, metavar="N", help="the longest answer of --batch; default 300")
    add("--json", type=Path, metavar="FILE", help="write every single result there")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    arguments = parse(words)
    try:
        if processes.started() > 1:
            raise ValueError("torchrun has started several benchmarks, which would measure one another; leave it out: "
                             "--ranks N starts N processes with one model by itself")
        from .measure import measure  # after parse, so that --help does not wait for torch

        measure(arguments)
        return 0
    except ModuleNotFoundError as error:
        print(f"benchmark: {error}; `uv run python -m scripts.benchmark` installs what it needs", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        sentence, *_ = str(error).strip().splitlines() or [type(error).__name__]
        print(f"benchmark: {sentence[:280]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    processes.be_quiet()
    sys.exit(processes.leave(main()))
