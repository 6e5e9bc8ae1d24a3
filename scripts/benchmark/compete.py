"""Contenders in processes of their own, measured in turn on a quiet machine."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch

from qwen3.engine.processes import LOST

from . import machine
from .report import Work

ROOT = Path(__file__).resolve().parents[2]


def note(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def progress(text: str) -> None:
    if sys.stderr.isatty():
        note(f"\r\033[K{text}", end="")


class Contender:
    """A process of contender.py, or several that share a model. The first is asked, and tells the others."""

    def __init__(self, folder: Path, package: str, arguments: argparse.Namespace, who: str = "ours", ranks: int = 1,
                 **how):
        threads = arguments.threads
        if ranks > 1 and arguments.device == "cpu":  # together as many as one process has
            threads = max(1, (threads or torch.get_num_threads()) // ranks)
        how = {"who": who, "folder": str(folder.resolve()), "package": package, "device": arguments.device,
               "threads": threads, **how}
        command = [sys.executable, "-m", f"{__package__}.contender", json.dumps(how)]
        self.name, self.errors, start = who, tempfile.TemporaryFile("w+"), time.perf_counter()
        pipes = {"text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        self.processes = []
        try:
            for rank, variables in enumerate(variables_of(ranks)):
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | variables,
                                                       stderr=self.errors, **(quiet if rank else pipes)))
            self.process = self.processes[0]
            self.started = self.answer() | {"seconds": time.perf_counter() - start}
        except BaseException:
            self.stop()
            raise

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            said = [line for line in self.errors.read().splitlines() if line.strip() and not line.startswith(" ")]
            own = [line for line in said if not LOST.search(line)]  # and not that another rank has ended
            raise ValueError(f"{self.name} ended: {(own or said or ['no message'])[-1]}")
        return json.loads(line)

    def ask(self, **task) -> dict:
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.communicate()


def variables_of(ranks: int) -> list[dict[str, str]]:
    """What torchrun would set for each of several processes on this machine; nothing for one."""
    if ranks == 1:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if sys.platform == "linux":  # the name of the machine may lead elsewhere, or nowhere
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return [{name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            for rank in range(ranks)]


class Patience:
    """Seconds left in this run to wait for a quiet machine; when they are used up, a busy one is measured."""

    def __init__(self, seconds: float):
        self.left, self.measured, self.disturbed = seconds, 0, 0

    def wait(self) -> bool:
        start = time.perf_counter()
        quiet = machine.wait_until_quiet(self.left, progress)
        waited = time.perf_counter() - start - machine.LOOK  # one look is no waiting
        self.left = max(0.0, self.left - waited) if quiet else 0.0
        return quiet

    def undisturbed(self, measure: Callable[[], dict], processes: list[int]) -> dict:
        """Repeat `measure` until no other process used the machine meanwhile, five times at most."""
        self.measured += 1
        for _ in range(5):
            quiet = self.wait()
            neighbours = machine.Neighbours(os.getpid(), *processes)
            result = measure()
            if quiet and not neighbours.disturb():
                return result
            if not quiet:  # and it will not become so
                break
        self.disturbed += 1
        return result

    def summary(self) -> str:
        return (f"other programs used this machine in {self.disturbed} of {self.measured} measurements; close them, or "
                "wait longer with --patience SECONDS, if more than the ratios matters")


def compete(folder: Path, work: Work, arguments: argparse.Namespace, rivals: dict[str, dict],
            tasks: list[dict]) -> dict:
    """Results by task, then by rival: one for each round. In a round all rivals start anew and do each task in turn.

    If several copies of the weights and the mapped file do not fit in memory, each rival does all its tasks before the
    next one starts. Otherwise pages of the file would be evicted and read from the disk again, which is slow.
    """
    results: dict[str, dict[str, list[dict]]] = {}
    free = import_module(f"{work.package}.weights").free_memory(torch.device(arguments.device))
    together = free is None or (len(rivals) + 1) * work.file_bytes < free
    for round_ in range(1, arguments.rounds + 1):
        for group in [rivals] if together else [{name: how} for name, how in rivals.items()]:
            running: dict[str, Contender] = {}
            try:
                for name, how in group.items():
                    progress(f"round {round_} of {arguments.rounds}: {name} starts")
                    arguments.patience.wait()
                    running[name] = Contender(how.get("folder", folder), work.package, arguments, **{
                        key: value for key, value in how.items() if key != "folder"})
                    results.setdefault("start", {}).setdefault(name, []).append(running[name].started)
                processes = [process.pid for contender in running.values() for process in contender.processes]
                for task in tasks:
                    label = f"{task['do']} {task['context']}"
                    for name, contender in running.items():
                        progress(f"round {round_} of {arguments.rounds}: {name}, {label}")
                        result = arguments.patience.undisturbed(lambda: contender.ask(**task), processes)
                        results.setdefault(label, {}).setdefault(name, []).append(result)
            finally:
                for contender in running.values():
                    contender.stop()
    progress("")
    return results
