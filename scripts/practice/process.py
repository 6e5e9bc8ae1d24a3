"""Checks run in another process (worker.py), which may hang or crash without harm. Here it is started and heard."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from .exercises import ROOT

SECONDS = 10  # that a learner's code may run without a pause
SILENCE = 150  # seconds without a line after which the process is ended, whatever it does


def verdicts(package: str, folder: Path, names: list[str], seconds: float = SECONDS,
             silence: float = SILENCE) -> Iterator[dict]:
    """{"name", "state": "right" | "not written" | "wrong", "text"} of each exercise, in order, as they come."""
    names = list(names)
    while names:
        done = 0
        for found in listen(package, folder, names, seconds, silence):
            yield found
            done += 1
        del names[:max(done, 1)]  # where the process has ended on the way, another goes on behind the last


def listen(package: str, folder: Path, names: list[str], seconds: float, silence: float) -> Iterator[dict]:
    command = [sys.executable, "-m", f"{__package__}.worker", package, str(folder), str(seconds), *names]
    # A session of its own: Ctrl-C reaches this process alone, which then ends that one.
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True, encoding="utf-8", start_new_session=True) as process:
        try:
            yield from answers(process, names, silence)
        finally:
            end(process)


def answers(process: subprocess.Popen, names: list[str], silence: float) -> Iterator[dict]:
    """A verdict for each name as the process gives it; after `silence` seconds without one, that it hangs."""
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    for number, name in enumerate(names):
        found, begun = {"state": "begun"}, False
        while found["state"] == "begun":
            try:
                line = lines.get(timeout=silence)
            except queue.Empty:
                yield {"name": name, "state": "wrong", "text": f"no answer after {silence:g} seconds, so it was ended; "
                                                               "a loop without end?"}
                return
            if line is None and number and not begun:
                return  # it ended with the exercise before this
            if line is None:
                yield {"name": name, "state": "wrong", "text": f"Python itself ended while this ran{code_of(process)}: "
                       "does it call os._exit, or wants more memory than there is?"}
                return
            found, begun = json.loads(line), True
        yield found


def code_of(process: subprocess.Popen) -> str:
    try:
        code = process.wait(5)
    except subprocess.TimeoutExpired:
        return ""
    if code < 0:
        with_name = {number.value: number.name for number in signal.Signals}
        return f" ({with_name.get(-code, -code)})"
    return f" (exit code {code})"


def end(process: subprocess.Popen) -> None:
    """Its whole session: a learner's code may have begun processes of its own."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
