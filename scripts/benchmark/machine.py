"""What this machine can do at most, and whether anything else uses it just now."""

import os
import time
from contextlib import suppress
from pathlib import Path

import torch

BUSY = 0.12  # cores that others may use; one busy neighbour slows two threads by a factor, not by a fraction
LOOK = 0.3  # seconds to look at what others use


def synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def seconds(work, device: torch.device, least: float = 0.3) -> float:
    """The time that `work` takes, the median of as many runs as fit in `least` seconds, at least three."""
    work()
    times: list[float] = []
    while sum(times) < least or len(times) < 3:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second: the sum of 1 GB of float32, the fastest reading that PyTorch has."""
    numbers = torch.ones(1 << 28, device=device)
    return numbers.nbytes / seconds(numbers.sum, device)


def matrix_rate(device: torch.device) -> tuple[float, torch.dtype]:
    """Operations a second (a multiply-add is two) of the fastest of a few matmuls, and its dtype.

    Usually bfloat16; on a processor without instructions for it float32 is faster.
    """
    best = 0.0, torch.bfloat16
    for dtype in (torch.bfloat16, torch.float32):
        for rows, in_features, out_features in ((512, 1024, 3072), (1024, 2048, 2048), (2048, 2048, 6144)):
            x = torch.randn(rows, in_features, device=device).to(dtype)
            W = torch.randn(out_features, in_features, device=device).to(dtype)
            rate = 2 * rows * in_features * out_features / seconds(lambda: torch.nn.functional.linear(x, W), device)
            best = max(best, (rate, dtype), key=lambda pair: pair[0])
    return best


def processor_name() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return "unknown processor"


def used(*processes: int) -> tuple[float, float] | None:
    """Seconds of processor time until now, (of all, of these processes); None where the system does not tell."""
    tick = os.sysconf("SC_CLK_TCK")
    try:
        names = "user nice system idle iowait irq softirq steal".split()
        numbers = dict(zip(names, map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])))
        own = 0
        for process in processes:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])
    except (OSError, ValueError):
        return None
    return (sum(numbers.values()) - numbers["idle"] - numbers["iowait"]) / tick, own / tick


class Neighbours:
    """How many cores all other processes used since this was made."""

    def __init__(self, *processes: int):
        self.processes = processes
        self.start, self.before = time.perf_counter(), used(*processes)

    def cores(self) -> float:
        after, passed = used(*self.processes), time.perf_counter() - self.start
        if self.before is None or after is None or passed < 0.05:
            return 0.0
        return max(0.0, (after[0] - self.before[0]) - (after[1] - self.before[1])) / passed

    def disturb(self) -> bool:
        passed = time.perf_counter() - self.start
        return self.cores() > BUSY + 0.02 / passed  # the counters move in steps of a hundredth of a second


def wait_until_quiet(patience: float, note) -> bool:
    """Wait until others use less than BUSY cores for a moment; False if they still do after `patience` seconds."""
    start = time.perf_counter()
    while True:
        neighbours = Neighbours(os.getpid())
        time.sleep(LOOK)
        if not neighbours.disturb():
            return True
        if time.perf_counter() - start > patience:
            return False
        note(f"waiting for a quiet machine: others use {neighbours.cores():.1f} cores")
