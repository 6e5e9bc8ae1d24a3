"""Answers as they end, in journals beside the file that is asked for; at the end one file in the prompts' order.

    answers.jsonl.part0     written now by the process of that number: a header, then a line for each answer
    answers.jsonl           made of all journals when every prompt has its answer; the journals are then removed

A line is written in one piece when its answer ends. After a kill the last one may be torn: it is cut off, and that
prompt is answered again.
"""

import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from .fields import plain, short

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

Place = tuple[Path, int, int]  # where an answer lies: file, first byte, number of bytes
PATIENCE = 5  # seconds for another process to let go of its journal, such as one that was just killed


def as_line(values: dict) -> bytes:
    """JSON on one line, in letters of all scripts; escaped where a text has what UTF-8 has not."""
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(values).encode() + b"\n"


def journals(output: Path) -> list[Path]:
    """The journals of an output file that are there."""
    pattern = re.compile(re.escape(output.name) + r"\.part\d{1,6}")
    return sorted(path for path in output.parent.iterdir() if pattern.fullmatch(path.name))


def read_journal(path: Path) -> tuple[dict | None, dict[int, Place], int]:
    """(The header's settings or None, where each prompt's answer lies, where the last whole line ends).

    ValueError for a whole line that this program has not written.
    """
    settings, places, start = None, {}, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # torn
            try:
                values = json.loads(line)
                if number == 1:
                    settings = dict(values["settings"])
                else:
                    places.setdefault(int(values["index"]), (path, start, len(line)))
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number}: damaged, or not of this program; `--restart` answers all "
                                 "prompts anew") from None
            start += len(line)
    return settings, places, start


def earlier_settings(output: Path) -> dict:
    """Those of the run that began this output; none if there was no such run."""
    for path in journals(output):
        with path.open("rb") as file, suppress(ValueError, TypeError, KeyError):  # a torn or damaged header
            return dict(json.loads(file.readline())["settings"])
    return {}


def answers_of(output: Path, settings: dict) -> dict[int, Place]:
    """Where the answers of earlier runs lie, by the prompts' numbers. ValueError if they had other settings."""
    places = {}
    for path in journals(output):
        earlier, some, _ = read_journal(path)
        if earlier is not None:
            check_same(path, earlier, settings)
            places |= some
    return places


def check_same(path: Path, before: dict, now: dict) -> None:
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            was, is_ = (short(values.get(name), 40) for values in (before, now))
            what = ("the file of prompts has changed" if name == "prompts" else
                    f"{plain(name)} was {was} and is {is_} now")
            raise ValueError(f"{path.name} was begun otherwise: {what}; go on as it was begun, or `--restart` answers "
                             "all prompts anew")


class Journal:
    """One process' journal, open for more answers. Raises ValueError while another process has it."""

    def __init__(self, output: Path, number: int, settings: dict):
        self.path = output.with_name(f"{output.name}.part{number}")
        self.file = self.path.open("ab")
        lock(self.path, self.file)
        header, _, end = read_journal(self.path)
        self.file.truncate(end)  # a torn line goes
        if header is None:
            self.write({"settings": settings})

    def write(self, values: dict) -> None:
        self.file.write(as_line(values))
        self.file.flush()

    def close(self) -> None:
        with suppress(OSError):  # a full disk was said when the line was written
            self.file.close()


def lock(path: Path, file) -> None:
    """Keep others from writing there; the lock ends with this process, however that ends."""
    until = time.monotonic() + PATIENCE
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise ValueError(f"{path.name}: another run is writing there; wait for it, or stop it") from None
            time.sleep(0.05)
        except OSError:  # some network file systems have no locks
            break
    if os.fstat(file.fileno()).st_nlink == 0:  # the other run ended meanwhile, and removed it
        raise ValueError(f"{path.name}: another run has just ended there; look at its answers")


def finish(output: Path, places: dict[int, Place]) -> None:
    """Write all answers in order, then remove the journals. A kill in between loses no answer: they go last."""
    part = output.with_name(f"{output.name}.tmp")
    files = {path: path.open("rb") for path in {path for path, *_ in places.values()}}
    try:
        with part.open("wb") as whole:
            for index in sorted(places):
                path, start, size = places[index]
                files[path].seek(start)
                whole.write(files[path].read(size))
            whole.flush()
            os.fsync(whole.fileno())
    finally:
        for file in files.values():
            file.close()
    os.replace(part, output)
    for path in journals(output):
        path.unlink(missing_ok=True)


def restart(output: Path) -> None:
    """Forget the answers of an earlier run, unless it is still going on."""
    for path in journals(output):
        with path.open("ab") as file:
            lock(path, file)
            path.unlink(missing_ok=True)
