"""Speed of a checkpoint against this machine's limits and, side by side, against a peer.

    uv run python -m scripts.benchmark                                   the default checkpoint of qwen3
    uv run --group reference python -m scripts.benchmark --shape qwen3-30b-a3b --layers 6 --against transformers

A shape is a published one with random weights, made under checkpoints/random/ when it is first asked for. Ours and the
peer run in processes of their own, in turn, so that both see the same machine; what was disturbed is measured again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median

import torch

from . import machine, shapes
from .report import Work, growth, rates, ratios, table
from .tricks import TRICKS

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60  # seconds to wait for a quiet machine before measuring all the same
PREFILL, DECODE = (512, 4096), (32, 4096)


def note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        note(f"\r\033[K{text}", end="")


class Contender:
    """A process of contender.py."""

    def __init__(self, folder: Path, package: str, arguments: argparse.Namespace, who: str = "ours", **how):
        how = {"who": who, "folder": str(folder.resolve()), "package": package, "device": arguments.device, "threads": arguments.threads, **how}
        self.name, self.errors, start = who, tempfile.TemporaryFile("w+"), time.perf_counter()
        self.process = subprocess.Popen([sys.executable, "-m", f"{__package__}.contender", json.dumps(how)], cwd=ROOT,
                                        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.started = self.answer() | {"seconds": time.perf_counter() - start}

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise ValueError(f"{self.name} ended: {(self.errors.read().strip() or 'no message').splitlines()[-1]}")
        return json.loads(line)

    def ask(self, **task) -> dict:
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def undisturbed(measure, processes: list[int]) -> dict:
    """`measure` again until no other process used the machine meanwhile, five times at most."""
    for attempt in range(5):
        quiet = machine.wait_until_quiet(PATIENCE, progress)
        neighbours = machine.Neighbours(os.getpid(), *processes)
        result = measure()
        if quiet and not neighbours.disturb():
            break
    else:
        note("not a quiet machine: a disturbed measurement was kept")
    return result


def compete(folder: Path, work: Work, arguments: argparse.Namespace, rivals: dict[str, dict], tasks: list[dict]) -> dict:
    """Results by task, then by rival: one for each round. In a round all rivals start anew and do each task in turn.

    Where several copies of the weights and the mapped file would not fit in memory, each rival does all its tasks before
    the next one starts: a page of the file that has to make room is read from the disk again, and slow.
    """
    results: dict[str, dict[str, list[dict]]] = {}
    free = import_module(f"{work.package}.weights").free_memory(torch.device("cpu"))
    together = free is None or (len(rivals) + 1) * work.file_bytes < free
    for round_ in range(1, arguments.rounds + 1):
        for group in [rivals] if together else [{name: how} for name, how in rivals.items()]:
            running: dict[str, Contender] = {}
            try:
                for name, how in group.items():
                    progress(f"round {round_} of {arguments.rounds}: {name} starts")
                    machine.wait_until_quiet(PATIENCE, progress)
                    running[name] = Contender(folder, work.package, arguments, **how)
                    results.setdefault("start", {}).setdefault(name, []).append(running[name].started)
                processes = [contender.process.pid for contender in running.values()]
                for task in tasks:
                    label = f"{task['do']} {task['context']}"
                    for name, contender in running.items():
                        progress(f"round {round_} of {arguments.rounds}: {name}, {label}")
                        result = undisturbed(lambda: contender.ask(**task), processes)
                        results.setdefault(label, {}).setdefault(name, []).append(result)
            finally:
                for contender in running.values():
                    contender.stop()
    progress("")
    return results


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-m", "--model", metavar="NAME_OR_FOLDER", help="a name under checkpoints/ or a folder")
    which.add_argument("--shape", metavar="NAME", help="a published shape with random weights; `--shape list` names them")
    add("--layers", type=int, metavar="N", help="only the first N layers of the shape")
    add("--against", choices=["transformers"], help="measure this as well, in turn (uv run --group reference)")
    add("-d", "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: cuda if there is one, else cpu")
    add("--threads", type=int, metavar="N", help="default: PyTorch's choice")
    add("--prefill", type=int, nargs="*", metavar="N", help=f"prompts of so many tokens; default {PREFILL} as far as the context allows")
    add("--decode", type=int, nargs="*", metavar="N", help=f"tokens after so many others; default {DECODE} likewise")
    add("--rounds", type=int, default=3, metavar="N", help="default 3")
    add("--compile", action="store_true", help="with torch.compile and static shapes")
    add("--plot", action="store_true", help="what a token costs from a context of 512 to 32768")
    add("--tricks", action="store_true", help="what each trick buys: ours against ours without it")
    add("--speculative", action="store_true", help="tokens a second with drafts and without (deepseek_v3)")
    add("--json", type=Path, metavar="FILE", help="write every single result there")
    return parser.parse_args(arguments)


def find(arguments: argparse.Namespace) -> tuple[str, Path]:
    """(name, folder) of the checkpoint; made if it is a shape."""
    known = shapes.published()
    if arguments.shape is not None and arguments.shape.lower() not in known:
        raise ValueError(f"--shape {arguments.shape}: known are {', '.join(known)}")
    if arguments.shape is None:
        if arguments.layers is not None:
            raise ValueError("--layers cuts a --shape; a checkpoint is measured as it is")
        name = arguments.model or ("Qwen3-0.6B" if (ROOT / "checkpoints/Qwen3-0.6B/config.json").exists() else "Qwen3-Tiny")
        return Path(name).name, Path(name) if Path(name).is_dir() else ROOT / "checkpoints" / name
    package, config = known[arguments.shape.lower()]
    config = shapes.cut(config, arguments.layers)
    name = arguments.shape.lower() + (f"-{arguments.layers}-layers" if arguments.layers else "")
    if arguments.speculative and package == "deepseek_v3" and not config.get("num_nextn_predict_layers"):
        config, name = config | {"num_nextn_predict_layers": 1}, f"{name}-drafting"
    return name, shapes.make(package, config, ROOT / "checkpoints/random" / name,
                             lambda done, total: progress(f"random weights, file {done} of {total}"))


def contexts(flag: str, given: list[int] | None, usual: tuple[int, ...], room: int) -> list[int]:
    """Of the default ones those too long for the checkpoint are halved until they fit; of one's own that is an error."""
    if given is None:
        return list(dict.fromkeys(shortened(n, room) for n in usual))
    if wrong := [n for n in given if not 1 <= n <= room]:
        raise ValueError(f"{flag} {wrong[0]}: expected 1 to {room} tokens, as the checkpoint's context allows")
    return given


def shortened(n: int, room: int) -> int:
    while n > max(room, 1):
        n //= 2
    return n


def measure(arguments: argparse.Namespace) -> None:
    if arguments.rounds < 1:
        raise ValueError(f"--rounds {arguments.rounds}: at least one is needed")
    name, folder = find(arguments)
    work = Work.of(folder)
    if arguments.speculative and work.package != "deepseek_v3":
        raise ValueError("--speculative is for deepseek_v3, whose layer for a second token can draft")
    count = 48 if arguments.device.startswith("cuda") else 16
    room = work.context_length - count - 3  # for what stands before the measured tokens, of which the first warm up
    prefill = contexts("--prefill", arguments.prefill, PREFILL, work.context_length - 1)
    decode = contexts("--decode", arguments.decode, DECODE, room)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    machine.wait_until_quiet(PATIENCE, progress)
    progress("measuring this machine's limits")
    rate, dtype = machine.matrix_rate(device)
    limits = {"bytes": machine.read_bandwidth(device), "operations": rate}
    progress("")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{machine.processor_name()}, {torch.get_num_threads()} threads"
    print(f"{name} on {where}, PyTorch {torch.__version__}")
    print(f"limits: reads {limits['bytes'] / 1e9:.1f} GB/s, multiplies {rate / 1e12:.2f} TFLOP/s in {str(dtype)[6:]}; "
          f"a token reads {work.weight_bytes / 1e9:.3f} GB of the {work.file_bytes / 1e9:.2f} GB of weights and "
          f"{work.cache_bytes / 1e3:.1f} kB for each token before it\n")
    tasks = [{"do": "prefill", "context": n} for n in prefill] + [{"do": "decode", "context": n, "count": count} for n in decode]
    ours = {"who": "ours", "compiled": arguments.compile}
    results: dict = {}
    if arguments.plot:
        tasks = [{"do": "decode", "context": 512 << i, "count": count} for i in range(7)
                 if 512 << i <= room]
        results = compete(folder, work, arguments, {"ours": ours}, tasks)
        print("\n".join(growth(work, results, limits)))
    elif arguments.tricks:
        results = tricks(folder, work, arguments, count, room)
    elif arguments.speculative:
        results = compete(folder, work, arguments, {"ours": ours}, [{"do": "speculation", "context": 32, "count": 64}])
        plain, drafting, tokens = (median([one[field] for one in results["speculation 32"]["ours"]])
                                   for field in ("plain", "drafting", "tokens_per_step"))
        print(f"{plain:.1f} tok/s plainly, {drafting:.1f} tok/s with drafts, {tokens:.2f} tokens for a step of the main model\n"
              f"with drafts {drafting / tokens:.1f} steps a second: {2 * drafting / tokens:.1f} tok/s if every draft were right, faster "
              f"than plainly from {max(0, plain * tokens / drafting - 1):.0%} on")
    else:
        peer = {arguments.against: {"who": arguments.against}} if arguments.against else {}
        ids = {"do": "ids", "context": 32, "count": 8}
        results = compete(folder, work, arguments, {"ours": ours, **peer}, [ids, *tasks])
        print("\n".join(table(work, results, limits, arguments.against)))
        if peer:
            mine, theirs = (results["ids 32"][who][0]["ids"] for who in ("ours", arguments.against))
            same = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(mine))
            print(f"\nthe first {same} of {len(mine)} greedy tokens are the same")
    if arguments.json:
        arguments.json.write_text(json.dumps({"name": name, "machine": where, "limits": limits, "work": asdict(work), "results": results}))


def tricks(folder: Path, work: Work, arguments: argparse.Namespace, count: int, room: int) -> dict:
    """For each trick: ours against ours without it, where it matters most."""
    print(f"{'trick':49}{'measured':14}{'without':>13}{'with':>13}   ratio (least-most)")
    every, names = {}, {"--compile": None} | {name: trick for name, trick in TRICKS.items() if work.package in trick.packages}
    if work.package != "qwen3" and arguments.device == "cpu":
        names.pop("--compile", None)  # needs experts in stacks
    if arguments.device != "cpu" or not import_module(f"{work.package}.layers").SLOW_IN_16_BITS:
        names.pop("many rows in float32", None)  # not done here
    for name, trick in names.items():
        what, context = (trick.what, shortened(trick.context, room)) if trick else ("decode", 32)
        rivals = {"ours": {"who": "ours", "compiled": trick is None}, "without": {"who": "ours", "without": name if trick else None}}
        tasks = [{"do": what, "context": context, "count": count}] if what != "start" else []
        every[name] = results = compete(folder, work, arguments, rivals, tasks)
        if tasks:
            label, form = f"{what} {context}", "{:.1f} tok/s"
            mine, other = rates(results, label, "ours"), rates(results, label, "without")
        else:
            label, form = "first token", "{:.2f} s"
            mine, other = ([one["first"] for one in results["start"][who]] for who in rivals)
        print(f"{name:49}{label:14}{form.format(median(other)):>13}{form.format(median(mine)):>13}   "
              + "{:.2f} ({:.2f}-{:.2f})".format(*ratios(mine, other)), flush=True)
    return every


def main(arguments: list[str] | None = None) -> int:
    try:
        measure(parse_arguments(arguments))
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        note(f"benchmark: {error}")
        return 2
    except KeyboardInterrupt:
        note("")
        return 130


if __name__ == "__main__":
    sys.exit(main())
