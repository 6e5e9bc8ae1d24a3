"""Train a small model from nothing, or fine-tune a checkpoint: uv run python -m scripts.train qwen3 --minutes 10

    uv run torchrun --nproc-per-node 2 -m scripts.train qwen3 --minutes 10        in two processes (together.py)

Without --data it learns what the embedded checkpoints know: a glossary of language models, small talk, and sums. Every
minute it answers the same three questions. Ctrl-C stops it, and the same command goes on where it stopped.
"""

import argparse
import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

from qwen3.engine import processes

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
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
        help="of the matmuls; default bfloat16. Weights are trained in float32 always")
    add("--threads", type=positive, metavar="N", help="of each process; default: PyTorch's choice")
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

    memory, ranks = importlib.import_module("qwen3.engine.memory"), processes.ranks()
    name = KINDS[arguments.package][0]
    folder = arguments.output or ROOT / "checkpoints" / f"my-{name}"
    source = find_source(arguments)
    if ranks > 1 and arguments.device not in ("cpu", "cuda"):
        raise ValueError(f"-d {arguments.device[:40]} is one device, and there are {ranks} processes; -d cuda gives "
                         "each a GPU of its own")
    memory.find_device(arguments.device)  # from now on "cuda" is this process's
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
        arguments.threads or learn.torch.get_num_threads(), arguments.device, arguments.dtype)
    processes.check_alike("flags and data", replace(plan, threads=0))
    processes.share_models(None)  # each has a whole one, and a part of the batch
    return learn.learn(plan, folder, arguments.replace, arguments.restart)


def complain(text: str, lost: bool = False) -> int:
    """One sentence why the program ends, said by one process; the exit code."""
    if (who := processes.who_speaks(lost)) is not None:
        print(f"train{who}: {text[:290]}", file=sys.stderr)
    return 2


def main(words: list[str] | None = None) -> int:
    """The program, which torchrun may have started several times: what is typed after its name -> the exit code."""
    arguments = parse(words)
    try:
        if arguments.evaluate_only:
            if processes.started() > 1:
                raise ValueError("--evaluate-only is for one process; start it without torchrun")
            from .evaluate import show_table  # after parse, so that --help does not wait for torch

            show_table(arguments.package, arguments.output or ROOT / "checkpoints" / KINDS[arguments.package][0])
            return 0
        processes.join()
        return train(arguments)
    except ModuleNotFoundError as error:
        return complain(f"{error}; `uv run python -m scripts.train` installs what it needs")
    except BrokenPipeError:  # `| head` has seen enough
        return processes.dismiss()
    except (ValueError, OSError, RuntimeError) as error:
        if processes.is_lost(error):
            return complain("another process has ended; its own message, if it left one, says why", lost=True)
        sentence, *_ = str(error).strip().splitlines() or [type(error).__name__]
        return complain(sentence)
    except Exception as error:
        if processes.started() == 1:
            raise
        return complain(f"internal error, please report it with your command: {type(error).__name__}: {error}")


if __name__ == "__main__":
    processes.be_quiet()
    try:
        code = main()
        sys.stdout.flush()
    except SystemExit as exit_:  # a flag that is none
        code = exit_.code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(processes.leave(code))
