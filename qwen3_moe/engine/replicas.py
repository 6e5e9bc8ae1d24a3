"""--data-parallel: several replicas of the model share a file of prompts, each in a process of its own.

    a store (TCP) has one number: which prompt comes next.     replica 0   takes 0, 3, 4, …   writes answers.jsonl.part0
    Who is free takes it and adds one, so that nobody waits    replica 1   takes 1, 2, 5, …   writes answers.jsonl.part1
    for anybody and no prompt is taken twice.                  the parent shows progress, and makes one file at the end

The program starts the replicas itself, or torchrun does, also on several machines; then rank 0 does the parent's part.
Replicas never talk to one another: this is no torch.distributed process group.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from . import terminal

if __name__ == "__main__":  # as in main.py
    terminal.start()

import torch
from torch.distributed import Store, TCPStore, rendezvous

from ..tokenizer import Tokenizer
from .batch_file import Job, find_output, load, merge, resume
from .continuous import Row
from .conversation import Conversation, chat_format
from .journal import Journal, answers_of
from .prepare import read_checkpoint
from .processes import TO_COME, why_not
from .progress import Progress, kept
from .terminal import PACKAGE, note, one_line, progress, sentence

NEXT, READY, FAILED, END = "batch/next", "batch/ready", "batch/failed", "batch/end"  # keys of the store
COUNTED = ("tokens", "done", "stop", "length", "error")
DAYS = timedelta(days=100)
ROOT = Path(__file__).resolve().parents[2]


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1) if "RANK" in os.environ else 1


def taken(store: Store, total: int, answered: set[int]) -> Iterator[int]:
    """The next prompt that nobody has taken, again and again."""
    while (index := store.add(NEXT, 1) - 1) < total:
        if index not in answered:
            yield index


class Shared:
    """Counts for all replicas, in the store; told once in a while, since a step is quicker than the network."""

    def __init__(self, store: Store):
        self.store, self.new, self.told = store, dict.fromkeys(COUNTED, 0), 0.0

    def count(self, tokens: int, ended: list[Row]) -> None:
        for name, number in (("tokens", tokens), ("done", len(ended)), *((row.end, 1) for row in ended)):
            self.new[name] += number
        if time.monotonic() - self.told > 0.3:
            self.tell()

    def tell(self) -> None:
        for name, number in self.new.items():
            if number:
                self.store.add(f"batch/{name}", number)
        self.new, self.told = dict.fromkeys(COUNTED, 0), time.monotonic()


def show(shown: Progress, store: Store, before: dict[str, int]) -> None:
    """The counts of all replicas; `before`: those of earlier stores."""
    for name in COUNTED:
        shown.counts[name] = before[name] + store.add(f"batch/{name}", 0)
    shown.show()


def replicate(job: Job, output: Path, rank: int, place: tuple, store: Store) -> None:
    """One replica's part: whatever it can take."""
    device, dtype, rows = place
    journal = Journal(output, rank, job.settings())
    try:
        places = answers_of(output, job.settings())
        shared = Shared(store)
        if len(places) < len(job.prompts):
            if device.type == "cuda":
                torch.cuda.set_device(device)  # for kernels that go to the current one
            model = load(job, device, dtype, None)
            job.run(model, taken(store, len(job.prompts), set(places)), rows, journal.write, shared.count)
        shared.tell()
    finally:
        journal.close()


def own_gpu(place: tuple, number: int) -> tuple:
    """Replica `number` of this machine gets the GPU of that number."""
    device, dtype, rows = place
    return torch.device(f"cuda:{number}") if device.type == "cuda" else device, dtype, rows


def find_place(job: Job, replicas: int) -> tuple:
    """Job.find_room for all replicas of this machine; ValueError where they have too few GPUs."""
    asked, place = job.conversation.arguments.device, job.find_room(replicas)
    device = place[0]
    if device.index is not None:
        raise ValueError(f"-d {asked} is a single device, and each replica needs its own; leave out the number")
    there = torch.cuda.device_count() if device.type == "cuda" else replicas if device.type == "cpu" else 1
    if replicas > there:
        raise ValueError(f"{replicas} replicas want a GPU each, and this machine has {there} for {device.type}; "
                         f"try --data-parallel {there}, or `-d cpu`")
    return place


# Started by the program itself

def run_replicas(job: Job, output: Path, replicas: int) -> None:
    """Start replicas and wait for them; what a killed one leaves undone is answered in another round."""
    if job.name == "-":
        raise ValueError("--data-parallel reads the prompts from a file, not from standard input")
    places = resume(job, output)
    shown, before = Progress(len(job.prompts), len(places)), dict.fromkeys(COUNTED, 0) | {"done": len(places)}
    if len(places) < len(job.prompts):
        place = find_place(job, replicas)
        with kept(shown):
            while len(places) < len(job.prompts):
                answered = len(places)
                one_round(job, min(replicas, len(job.prompts) - answered), place, shown, before)
                places = answers_of(output, job.settings())
                if len(places) == answered:
                    raise ValueError("the replicas were killed before they had an answer; is memory full? Try a "
                                     "smaller --batch-size or --data-parallel")
                before = dict(shown.counts) | {"done": len(places)}
    merge(job, output)
    note(f"{shown.summary()}; {output}")


def one_round(job: Job, replicas: int, place: tuple, shown: Progress, before: dict[str, int]) -> None:
    """Until every replica has ended, one way or another. ValueError with the sentence of one that could not start."""
    server = socket.create_server(("127.0.0.1", 0))  # the store itself would listen on all interfaces
    store = TCPStore("127.0.0.1", server.getsockname()[1], is_master=True, wait_for_workers=False,
                     master_listen_fd=server.detach())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    if place[0].type == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // replicas))
    processes = []
    try:
        for number in range(replicas):
            # A session of its own: Ctrl-C reaches the parent alone, which ends the others.
            processes.append(subprocess.Popen(
                [sys.executable, "-m", f"{PACKAGE}.engine.replicas"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                start_new_session=True, env=environment, text=True))
            device, dtype, rows = own_gpu(place, number)
            order = json.dumps({"arguments": vars(job.conversation.arguments) | {"seed": job.seed},
                                "folder": str(job.conversation.folder), "number": number, "port": store.port,
                                "capacity": job.capacity, "place": [str(device), dtype, rows]})
            with suppress(BrokenPipeError):  # killed already: the loop below says so
                processes[-1].stdin.write(f"{order}\n")
                processes[-1].stdin.flush()
        said = set()
        while running := [process for process in processes if process.poll() is None]:
            if store.check([FAILED]):
                raise ValueError(store.get(FAILED).decode())
            for number, process in enumerate(processes):
                if process.poll() and number not in said and not store.check([FAILED]):
                    said.add(number)
                    shown.clear()
                    note(f"replica {number} was ended (exit code {process.returncode})"
                         + (": the others go on" if running else ""))
            show(shown, store, before)
            time.sleep(0.1)
        if store.check([FAILED]):
            raise ValueError(store.get(FAILED).decode())
        show(shown, store, before)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def replica() -> int:
    """The process of a replica: orders come as a line of standard input, whose end means that the parent is gone."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):  # gone already
        return 1
    order = json.loads(line)
    threading.Thread(target=lambda: sys.stdin.read() or os._exit(1), daemon=True).start()
    store = TCPStore("127.0.0.1", order["port"], is_master=False)
    try:
        arguments, folder = argparse.Namespace(**order["arguments"]), Path(order["folder"])
        config, _ = read_checkpoint(folder)
        tokenizer = Tokenizer.from_checkpoint(folder, **chat_format(arguments))
        job = Job(Conversation(arguments, folder, config, tokenizer))
        job.seed, job.capacity = arguments.seed, order["capacity"]
        device, dtype, rows = order["place"]
        replicate(job, find_output(job), order["number"], (torch.device(device), dtype, rows), store)
        return 0
    except Exception as error:
        store.set(FAILED, sentence(error) or f"internal error, please report it: {one_line(error)}"[:280])
        return 2


# Started by torchrun

def leave_the_word() -> NoReturn:
    """Rank 0 says why; torchrun ends all when the first one ends."""
    time.sleep(2)
    sys.exit(2)


def take_part(conversation: Conversation, notes: Iterable[str]) -> None:
    """Each rank is a replica; rank 0 also checks, shows progress and makes one file of all answers at the end."""
    arguments = conversation.arguments
    world, rank = launched(), int(os.environ.get("RANK") or 0)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    number = int(os.environ.get("LOCAL_RANK", rank))
    if arguments.data_parallel != world:
        if rank > 0:
            leave_the_word()
        raise ValueError(f"torchrun has started {world} processes: with --data-parallel {world} each answers a part of "
                         "the prompts, and without it they share one model")
    try:
        store, *_ = next(rendezvous("env://", timeout=timedelta(seconds=TO_COME)))
    except (RuntimeError, ValueError) as error:
        raise ValueError(why_not(str(error))) from None
    store.set_timeout(DAYS)  # rank 0 may check a long file
    if rank > 0:
        ready = json.loads(store.get(READY))
        if ready is None:
            leave_the_word()
        job = Job(conversation)
        job.seed, job.capacity = ready["seed"], ready["capacity"]
        place = torch.device(ready["place"][0]), *ready["place"][1:]
        replicate(job, find_output(job), rank, own_gpu(place, number), store)
        store.set(f"{END}{rank}", "")
        return
    try:
        job = Job(conversation).check(progress("checking prompt"))
        job.say(notes)
        output = find_output(job)
        if output is None or job.name == "-":
            raise ValueError("under torchrun prompts and answers are in files: --batch FILE -o FILE")
        places, place = resume(job, output), find_place(job, local)
    except BaseException:
        store.set(READY, "null")
        raise
    store.set(READY, json.dumps({"seed": job.seed, "capacity": job.capacity, "place": [str(place[0]), *place[1:]]}))
    shown = Progress(len(job.prompts), len(places))
    before = dict.fromkeys(COUNTED, 0) | {"done": len(places)}
    ended = threading.Event()

    def watch() -> None:  # the store is the master's own: asking it costs nothing
        while not ended.wait(0.3):
            show(shown, store, before)

    with kept(shown):
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            replicate(job, output, rank, own_gpu(place, number), store)
            while not store.check([f"{END}{other}" for other in range(1, world)]):  # wait() would keep `watch` out
                time.sleep(0.1)
        finally:
            ended.set()
            watcher.join()
        show(shown, store, before)
    merge(job, output)
    note(f"{shown.summary()}; {output}")


if __name__ == "__main__":
    terminal.program(replica)
