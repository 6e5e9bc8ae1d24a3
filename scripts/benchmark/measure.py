"""What is measured: prompts, decode steps, loading; or growth with the context, tricks, drafts. Prints the tables."""

import argparse
import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median

import torch

from . import machine, shapes
from .compete import ROOT, Patience, compete, note, progress
from .report import Work, growth, rates, ratios, shared, size, table
from .tricks import TRICKS, Trick

PREFILL, DECODE, PLOT = (512, 4096), (32, 4096), 32768
IN_CACHE = 50e6  # bytes of weights that a processor's own cache may hold


def find(arguments: argparse.Namespace) -> tuple[str, Path]:
    """(name, folder) of the checkpoint; made if it is a shape."""
    known = shapes.published()
    if arguments.shape is not None and arguments.shape.lower() not in known:
        raise ValueError(f"--shape {arguments.shape[:80]}: no such published shape; known are {next(iter(known))} and "
                         f"{len(known) - 1} others, which `--shape list` names")
    if arguments.shape is None:
        if arguments.layers is not None:
            raise ValueError("--layers cuts a --shape; a checkpoint is measured as it is")
        name = arguments.model or "Qwen3-0.6B"
        if arguments.model is None and not (ROOT / "checkpoints/Qwen3-0.6B/config.json").exists():
            name = "Qwen3-Tiny"
            note("note: Qwen3-0.6B is not downloaded (`bash scripts/download_qwen3.sh` gets it): measuring Qwen3-Tiny")
        return Path(name).name, Path(name) if Path(name).is_dir() else ROOT / "checkpoints" / name
    package, config = known[arguments.shape.lower()]
    config = shapes.cut(config, arguments.layers)
    name = arguments.shape.lower() + (f"-{arguments.layers}-layers" if arguments.layers else "")
    if arguments.speculative and package == "deepseek_v3" and not config.get("num_nextn_predict_layers"):
        config, name = config | {"num_nextn_predict_layers": 1}, f"{name}-drafting"
    return name, shapes.make(package, config, ROOT / "checkpoints/random" / name,
                             lambda done, total: progress(f"random weights, file {done} of {total}"))


def peer_of(arguments: argparse.Namespace, work: Work) -> dict[str, dict]:
    """Its name -> how to start what --against asks for; ValueError or FileNotFoundError where it cannot be compared."""
    if arguments.against in (None, "transformers"):
        return {arguments.against: {"who": arguments.against}} if arguments.against else {}
    folder = next((path for path in (Path(arguments.against), ROOT / "checkpoints" / arguments.against)
                   if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"--against {arguments.against[:80]}: neither transformers nor a checkpoint, by a name "
                                "under checkpoints/ or a folder")
    if shapes.package_of(folder) != work.package:
        raise ValueError(f"--against {folder.name}: it is for {shapes.package_of(folder)}, the other one for "
                         f"{work.package}")
    return {folder.name: {"who": "ours", "folder": folder}}


def contexts(flag: str, given: list[int] | None, usual: tuple[int, ...], room: int) -> list[int]:
    """Defaults that are too long for the checkpoint are halved until they fit; a given number too long is an error."""
    if given is None:
        return list(dict.fromkeys(shortened(n, room) for n in usual))
    if wrong := [n for n in given if not 1 <= n <= room]:
        raise ValueError(f"{flag} {wrong[0]}: expected 1 to {room} tokens, as the checkpoint's context allows")
    return given


def shortened(n: int, room: int) -> int:
    while n > max(room, 1):
        n //= 2
    return n


def plotted(room: int) -> list[int]:
    """Seven contexts, each twice the one before it, or as many as fit."""
    last = shortened(PLOT, room)
    return [last >> i for i in reversed(range(7)) if last >> i >= 32]


def tricks_of(work: Work, device: str) -> dict[str, Trick | None]:
    """What --tricks can leave out here; None stands for --compile."""
    names = {"--compile": None} if can_compile(work, device) else {}
    names |= {name: trick for name, trick in TRICKS.items() if work.package in trick.packages}
    if device != "cpu" or not import_module(f"{work.package}.engine.fast").SLOW_IN_16_BITS:
        names.pop("many rows in float32", None)  # not done here
    return names


def can_compile(work: Work, device: str) -> bool:
    return work.package == "qwen3" or device != "cpu"  # needs experts in stacks


def check_ranks(arguments: argparse.Namespace, work: Work, folder: Path) -> None:
    """ValueError where so many processes cannot share the checkpoint, or this machine."""
    n, device = arguments.ranks, arguments.device
    if n < 2:
        raise ValueError(f"--ranks {n}: expected 2 or more; one process is measured beside them")
    if arguments.against:
        raise ValueError("--ranks compares with one process, --against with another program: one of them at a time")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"-d {device[:40]} is one device, and {n} ranks want one each: -d cuda, or -d cpu")
    if device == "cuda" and torch.cuda.device_count() < n:
        raise ValueError(f"--ranks {n}: each has a GPU of its own, and this machine has {torch.cuda.device_count()}; "
                         "-d cpu shares its cores")
    shares, parallel, prepare = (import_module(f"{work.package}.engine.{name}") for name in (
        "shares", "parallel", "prepare"))
    config, files = prepare.read_checkpoint(folder)
    for rank in range(n):
        each = shares.Shares(config, files, parallel.Place(rank, n))
        for name in files.tensors:
            each.of(name)


def check(arguments: argparse.Namespace, work: Work, folder: Path) -> None:
    """ValueError for what cannot be measured, before minutes are spent on it."""
    if arguments.speculative and work.package != "deepseek_v3":
        raise ValueError("--speculative is for deepseek_v3, whose MTP module can draft")
    if arguments.batch is not None and arguments.batch < 1 or arguments.answers < 1:
        raise ValueError(f"--batch {arguments.batch} --answers {arguments.answers}: expected 1 or more")
    if arguments.batch and 32 + arguments.answers > work.context_length:
        raise ValueError(f"--answers {arguments.answers}: the checkpoint's context has {work.context_length} tokens, "
                         "and prompts take 32")
    if arguments.compile and (arguments.speculative or arguments.tricks or arguments.batch):
        raise ValueError("--compile goes with the usual measurement and with --plot only")
    if arguments.compile and not can_compile(work, arguments.device):
        raise ValueError(f"--compile needs a GPU for {work.package}, whose experts are in stacks only there; leave it "
                         "out")
    if arguments.ranks is not None:
        check_ranks(arguments, work, folder)
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.parent.is_dir()):
        raise ValueError(f"--json {arguments.json}: not a file in a folder that exists")


def say_what_fits(arguments: argparse.Namespace, name: str, work: Work, room: int) -> None:
    """Which usual lengths are too long for the checkpoint's context."""
    usual = [*(PREFILL if arguments.prefill is None else ()), *(DECODE if arguments.decode is None else ())]
    if arguments.plot:
        usual = [PLOT]
    elif arguments.tricks:
        usual = [trick.context for trick in tricks_of(work, arguments.device).values() if trick]
    elif arguments.speculative or arguments.batch:
        usual = []
    if long := [n for n in usual if n > room]:
        note(f"note: {name} has a context of {work.context_length} tokens, so that lengths go up to "
             f"{shortened(max(long), room)} instead of {max(long)}")


def measure(arguments: argparse.Namespace) -> None:
    """What the command line asks for, measured and printed. Raises ValueError for what cannot be measured."""
    if arguments.shape == "list":
        return print("\n".join(shapes.published()))
    if arguments.rounds < 1:
        raise ValueError(f"--rounds {arguments.rounds}: at least one is needed")
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name, folder = find(arguments)
    work = Work.of(folder)
    check(arguments, work, folder)
    peers = peer_of(arguments, work)
    count = 48 if arguments.device.startswith("cuda") else 16
    room = work.context_length - count - 3  # tokens before the measured ones; the first measured ones warm up
    prefill = contexts("--prefill", arguments.prefill, PREFILL, work.context_length - 1)
    decode = contexts("--decode", arguments.decode, DECODE, room)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    say_what_fits(arguments, name, work, room)
    if work.file_bytes < IN_CACHE:
        note(f"note: {size(work.file_bytes)} of weights fit in a processor's cache, so that a step is mostly Python: "
             "far from the limits, and no guide to large models; --shape qwen3-0.6b measures one, with random weights")
    arguments.patience = patience = Patience(arguments.patience)  # of the whole run
    patience.wait()
    progress("measuring this machine's limits")
    rate, dtype = machine.matrix_rate(device)
    limits = {"bytes": machine.read_bandwidth(device), "operations": rate}
    progress("")
    where = (torch.cuda.get_device_name(device) if device.type == "cuda"
             else f"{machine.processor_name()}, threads: {torch.get_num_threads()}")
    print(f"{name} on {where}, PyTorch {torch.__version__}")
    print(f"limits: reads {limits['bytes'] / 1e9:.1f} GB/s, multiplies {rate / 1e12:.2f} TFLOP/s in {str(dtype)[6:]}; "
          f"a token reads {size(work.weight_bytes)} of the {size(work.file_bytes)} of weights and "
          f"{work.cache_bytes / 1e3:.1f} kB for each token before it\n")
    tasks = [{"do": "prefill", "context": n} for n in prefill]
    tasks += [{"do": "decode", "context": n, "count": count} for n in decode]
    ours = {"who": "ours", "compiled": arguments.compile}
    results: dict = {}
    if arguments.plot:
        tasks = [{"do": "decode", "context": n, "count": count} for n in plotted(room)]
        results = compete(folder, work, arguments, {"ours": ours}, tasks)
        print("\n".join(growth(work, results, limits)))
    elif arguments.tricks:
        results = tricks(folder, work, arguments, count, room)
    elif arguments.speculative:
        results = compete(folder, work, arguments, {"ours": ours}, [{"do": "speculation", "context": 32, "count": 64}])
        plain, drafting, tokens = (median([one[field] for one in results["speculation 32"]["ours"]])
                                   for field in ("plain", "drafting", "tokens_per_step"))
        steps, needed = drafting / tokens, max(0, plain * tokens / drafting - 1)
        print(f"{plain:.1f} tok/s without drafts, {drafting:.1f} tok/s with them, "
              f"{tokens:.2f} tokens for a step of the main model\n"
              f"with drafts {steps:.1f} steps a second: {2 * steps:.1f} tok/s if every draft were accepted, "
              f"faster than without from {needed:.0%} accepted on")
    elif arguments.batch:
        task = {"do": "batch", "context": 32, "count": arguments.answers, "rows": arguments.batch}
        results = compete(folder, work, arguments, {"ours": ours}, [task])
        slices, refilled = ([one[name] for one in results["batch 32"]["ours"]] for name in ("slices", "continuous"))
        print(f"{12 * arguments.batch} answers of {min(10, arguments.answers)} to {arguments.answers} tokens, "
              f"{arguments.batch} at a time: {median(slices):,.1f} tok/s in slices, "
              f"{median(refilled):,.1f} tok/s refilled, "
              "{:.2f} times as many ({:.2f}-{:.2f})".format(*ratios(refilled, slices)))
    elif arguments.ranks:
        results = ranks(folder, work, arguments, tasks)
    else:
        against = next(iter(peers), None)
        ids = {"do": "ids", "context": 32, "count": 8}
        results = compete(folder, work, arguments, {"ours": ours, **peers}, [ids, *tasks])
        print("\n".join(table(work, results, limits, against)))
        if peers:
            mine, theirs = (results["ids 32"][who][0]["ids"] for who in ("ours", against))
            same = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(mine))
            print(f"\nthe first {same} of {len(mine)} greedy tokens are the same")
    if patience.disturbed:
        note(f"note: {patience.summary()}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"name": name, "machine": where, "limits": limits, "work": asdict(work),
                                              "results": results}))


def ranks(folder: Path, work: Work, arguments: argparse.Namespace, tasks: list[dict]) -> dict:
    """One model in several processes against one process, with the time that they spend in their sums."""
    name, backend = f"{arguments.ranks} ranks", "gloo" if arguments.device == "cpu" else "nccl"
    if arguments.device == "cpu":
        note("note: ranks on one CPU share its cores and its memory, so that little is gained; each gets its part of "
             "the threads of one process")
    rivals = {"1 process": {"compiled": arguments.compile},
              name: {"compiled": arguments.compile, "ranks": arguments.ranks}}
    free = import_module(f"{work.package}.weights").free_memory(torch.device(arguments.device))
    if arguments.device == "cuda" and free is not None and work.file_bytes > free:
        del rivals["1 process"]
        note(f"note: a GPU has {size(free)} free, the weights are {size(work.file_bytes)}: only ranks are measured")
    results = compete(folder, work, arguments, rivals, [*tasks, {"do": "sum", "context": 0}])
    print("\n".join(shared(results, "1 process", name, backend)))
    return results


def tricks(folder: Path, work: Work, arguments: argparse.Namespace, count: int, room: int) -> dict:
    """For each trick: ours against ours without it, where it matters most."""
    print(f"{'trick':49}{'measured':14}{'without':>16}{'with':>16}   ratio (least-most)")
    every: dict[str, dict] = {}
    for name, trick in tricks_of(work, arguments.device).items():
        what, context = (trick.what, shortened(trick.context, room)) if trick else ("decode", 32)
        rivals = {"ours": {"who": "ours", "compiled": trick is None},
                  "without": {"who": "ours", "without": name if trick else None}}
        tasks = [{"do": what, "context": context, "count": count}] if what != "start" else []
        every[name] = results = compete(folder, work, arguments, rivals, tasks)
        if tasks:
            label, form = f"{what} {context}", "{:.1f} tok/s"
            mine, other = rates(results, label, "ours"), rates(results, label, "without")
        else:
            label, form = "first token", "{:.2f} s"
            mine, other = ([one["first"] for one in results["start"][who]] for who in rivals)
        print(f"{name:49}{label:14}{form.format(median(other)):>16}{form.format(median(mine)):>16}   "
              + "{:.2f} ({:.2f}-{:.2f})".format(*ratios(mine, other)), flush=True)
    return every
