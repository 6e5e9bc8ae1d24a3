"""What a training shows in the terminal: its loss as a curve, and the same questions again and again."""

import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

BARS = " ▁▂▃▄▅▆▇█"


def thin(values: Sequence[float], count: int) -> list[float]:
    """At most `count` values, each the mean of its neighbours."""
    if len(values) <= count:
        return list(values)
    edges = [len(values) * i // count for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """The values in one line of blocks, on a logarithmic scale."""
    logs = [math.log(max(value, 1e-4)) for value in thin(values, width)]
    low, high = min(logs), max(logs)
    return "".join(BARS[1 + round(7 * (value - low) / (high - low or 1))] for value in logs)


def curve(values: Sequence[float], width: int = 60, height: int = 8) -> str:
    """The values as a curve of `height` lines, the loss on a logarithmic scale at the left, the steps below."""
    logs = [math.log(max(value, 1e-4)) for value in thin(values, width)]
    low, high = min(logs), max(logs)
    levels = [8 * height * (value - low) / (high - low or 1) for value in logs]
    lines = []
    for row in range(height - 1, -1, -1):
        loss = math.exp(low + (high - low) * (row + 0.5) / height)
        blocks = "".join(BARS[max(0, min(8, round(level - 8 * row)))] for level in levels)
        lines.append(f"{loss:7.3f} ┤{blocks}")
    lines.append(" " * 8 + "└" + "─" * len(logs))
    last = f"{len(values):,} steps"
    lines.append(" " * 9 + "0" + last.rjust(len(logs) - 1))
    return "\n".join(lines)


def progress(text: str) -> None:
    """One line on standard error that the next one overwrites; nothing where nobody watches."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{min(width, 78)}}", end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="", file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class Clock:
    """Rings every minute; less often where what is then done would take more than a fifth of the time."""

    def __init__(self, every: float = 60.0):
        self.every, self.next = every, time.monotonic() + every

    def rings(self) -> bool:
        return time.monotonic() >= self.next

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is done at the ring."""
        began = time.monotonic()
        yield
        ended = time.monotonic()
        self.next = ended + max(self.every, 4 * (ended - began))
