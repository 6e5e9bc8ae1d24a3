"""How far a file of prompts is answered: one line on standard error."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from .continuous import Row
from .terminal import is_terminal, note, takes_escapes

QUIET = 60  # seconds between two lines of progress where they stay


class Progress:
    """One line on standard error: how many answers, tokens a second, and how long the others may take."""

    def __init__(self, total: int, done: int):
        self.total, self.counts, self.start = total, Counter(done=done), time.monotonic()
        self.before, self.shown = done, self.start if not is_terminal(sys.stderr) else 0.0

    def count(self, tokens: int, ended: list[Row]) -> None:
        self.counts.update(tokens=tokens, done=len(ended), **Counter(row.end for row in ended))
        self.show()

    def show(self) -> None:
        """Write the line anew, a few times a second at a terminal and seldom into a file."""
        now, stays = time.monotonic(), not is_terminal(sys.stderr)
        self.start = self.start if self.counts["tokens"] else now
        if now - self.shown < (QUIET if stays else 0.2):
            return
        self.shown, spent, done = now, now - self.start, self.counts["done"]
        text = f"{done:,}/{self.total:,} answers · {self.rate():,.0f} tok/s"
        if new := done - self.before:
            text += f" · {duration(spent / new * (self.total - done))} left"
        if stays:
            note(text)
        else:
            columns = shutil.get_terminal_size().columns - 1
            note("\r" + text[:columns].ljust(0 if takes_escapes(sys.stderr) else columns)
                 + ("\033[K" if takes_escapes(sys.stderr) else ""), end="")

    def rate(self) -> float:
        """Tokens a second, from the first one on: replicas have to load the model."""
        return self.counts["tokens"] / max(time.monotonic() - self.start, 1e-6)

    def clear(self) -> None:
        if is_terminal(sys.stderr) and self.shown:
            columns = shutil.get_terminal_size().columns - 1
            note("\r\033[K" if takes_escapes(sys.stderr) else "\r" + " " * columns + "\r", end="")

    def summary(self) -> str:
        counts, new = self.counts, self.counts["done"] - self.before
        text = (f"{new:,} answers, {counts['tokens']:,} tokens in {duration(time.monotonic() - self.start)}, "
                f"{self.rate():,.0f} tok/s")
        if counts["length"]:
            text += f"; {counts['length']:,} cut off (-n, or the context, allows no more)"
        if counts["error"]:
            text += f"; {counts['error']:,} ended early, since their logits were not finite (try --dtype float32)"
        return text


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@contextmanager
def kept(shown: Progress) -> Iterator[None]:
    """Around the work: the line is cleared, and who stops the work hears that nothing is lost."""
    try:
        yield
    except BaseException:
        shown.clear()
        if shown.counts["done"]:
            note(f"{shown.counts['done']:,} of {shown.total:,} answers are kept; the same command goes on")
        raise
    shown.clear()
