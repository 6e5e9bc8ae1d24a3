"""Python programs that begin with torch imported, forked from a process that has done it once for all tests.

    start(["-m", "qwen3.main", …])        as subprocess.Popen([sys.executable, "-m", "qwen3.main", …])

An import of torch takes two seconds of a processor, and a test of several processes starts three or more. What a
program starts itself, such as the ranks of torchrun, imports torch as usual.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
LOCK = threading.Lock()
FORKS = sys.platform == "linux"  # elsewhere a process with torch may not survive it


class Program:
    """What a test uses of subprocess.Popen."""

    forker: socket.socket | None = None  # to the process that forks

    def __init__(self, words: list[str], stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env: dict | None = None):
        self.returncode, ours, theirs = None, [None] * 3, []
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == PIPE:
                ends = os.pipe()
                ours[number] = open(ends[number == 0], "w" if number == 0 else "r", encoding="utf-8")
                theirs.append(ends[number > 0])
            else:
                theirs.append(os.open(os.devnull, os.O_RDWR) if stream == DEVNULL else os.dup(stream.fileno()))
        self.stdin, self.stdout, self.stderr = ours
        self.end, other = socket.socketpair()  # where its exit code comes
        with LOCK:
            if Program.forker is None:
                Program.forker = start_forker()
            order = json.dumps({"words": list(map(str, words)), "env": dict(os.environ if env is None else env)})
            socket.send_fds(Program.forker, [b"%10d" % len(order)], [*theirs, other.fileno()])
            Program.forker.sendall(order.encode())
        for number in theirs:
            os.close(number)
        other.close()
        self.pid = int(self.end.recv(20))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self.end.recv(20))
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, typed: str | None = None, timeout: float | None = None) -> tuple[str, str]:
        """(Standard output, standard error) to their ends."""
        read = [[], []]
        readers = [threading.Thread(target=lambda stream=stream, all=all: all.append(stream.read()), daemon=True)
                   for stream, all in zip((self.stdout, self.stderr), read)]
        for reader in readers:
            reader.start()
        if self.stdin:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(typed or "")
                self.stdin.close()
        until = time.monotonic() + (timeout or 600)
        self.wait(timeout)
        for reader in readers:
            reader.join(max(until - time.monotonic(), 0))
        return tuple("".join(all) for all in read)


def start(words: list[str], **more) -> Program | subprocess.Popen:
    if FORKS:
        return Program(words, **more)
    usual = {"stdin": DEVNULL, "stdout": PIPE, "stderr": PIPE}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, **usual | more)


def start_forker() -> socket.socket:
    """A connection to a process that forks programs, until the connection ends."""
    ours, theirs = socket.socketpair()
    subprocess.Popen([sys.executable, "-m", "tests.warm", str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT,
                     stdin=DEVNULL, stdout=DEVNULL, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    theirs.close()
    return ours


def read(connection: socket.socket) -> tuple[dict, list[int]]:
    """An order, and the streams that come with it."""
    size, streams, *_ = socket.recv_fds(connection, 10, 4)
    if not size:
        os._exit(0)
    return json.loads(connection.recv(int(size), socket.MSG_WAITALL)), streams


def serve(connection: socket.socket) -> list[str]:
    """Fork whatever is ordered. Returns in each new process, with its words."""
    ends: dict[int, socket.socket] = {}  # of processes that run
    ready, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        found, *_ = select.select([connection, ready], [], [])
        if connection in found:
            order, (*streams, end) = read(connection)
            if (pid := os.fork()) == 0:
                break
            for stream in streams:
                os.close(stream)
            ends[pid] = socket.socket(fileno=end)
            ends[pid].send(b"%d" % pid)
        if ready in found:
            os.read(ready, 1000)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    with contextlib.suppress(OSError), ends.pop(ended[0]) as end:  # the test may be over
                        end.send(b"%d" % os.waitstatus_to_exitcode(ended[1]))
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for other in (connection, *ends.values()):
        other.close()
    for number in (end, ready, wake):
        os.close(number)
    os.environ.clear()
    os.environ.update(order["env"])
    return order["words"]


def main() -> None:
    import safetensors.torch  # noqa: F401
    import tokenizers  # noqa: F401
    import torch.distributed.run

    del sys.modules["torch.distributed.run"]  # what it imports stays, and it can be run
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    if is_module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
