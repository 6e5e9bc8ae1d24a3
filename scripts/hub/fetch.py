"""Download files of a hub into a folder: several in parallel, resumed after an interruption, complete or absent.

A file arrives as NAME.HASH.part. It gets its own name when its size and its hash are those that the hub gives.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .client import Failure, File, Hub, Stopped, size_of

AT_ONCE = 4  # files
RECORD = ".verified.json"
PART = re.compile(r"(.+)\.[0-9a-f]{8}\.part")


def hash_of(path: Path, file: File) -> str:
    digest = hashlib.sha256() if len(file.hash) == 64 else hashlib.sha1(f"blob {file.size}\0".encode())
    with path.open("rb") as opened:
        while piece := opened.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether no other process fetches into this folder. The lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a disk that knows no locks
            free = True
        yield free
    finally:
        os.close(handle)


class Verified:
    """Hashes of files that were checked before, so that 60 GB are not read again unless size or time has changed."""

    def __init__(self, folder: Path):
        self.folder, self.lock, self.known = folder, threading.Lock(), {}
        try:
            known = json.loads((folder / RECORD).read_text())
            self.known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            pass  # none yet, or damaged: everything is read

    def is_known(self, file: File) -> bool:
        path = self.folder / file.name
        return path.is_file() and self.known.get(file.name) == [path.stat().st_size, path.stat().st_mtime_ns, file.hash]

    def is_whole(self, file: File) -> bool:
        if self.is_known(file):
            return True
        path = self.folder / file.name
        if not path.is_file() or size_of(path) != file.size or hash_of(path, file) != file.hash:
            return False
        self.add(file)
        return True

    def add(self, file: File) -> None:
        with self.lock:
            status = (self.folder / file.name).stat()
            self.known[file.name] = [status.st_size, status.st_mtime_ns, file.hash]
            new = self.folder / f"{RECORD}.tmp"
            try:
                new.write_text(json.dumps(self.known))
                new.replace(self.folder / RECORD)
            except OSError:
                pass  # it only saves time


class Fetch:
    """Downloads files of a hub into a folder, AT_ONCE of them at a time.

    done: bytes that are there, by name. to_come: bytes that the network brings. needed: bytes of disk that they and
    copies out of the cache take; replaced: what wrong files under the same names give back.
    """

    def __init__(self, hub: Hub, folder: Path, verified: Verified, files: list[File]):
        self.hub, self.folder, self.verified = hub, folder, verified
        self.done, self.cached, self.to_come, self.needed, self.replaced = {}, {}, 0, 0, 0
        for file in files:
            path, part = folder / file.name, folder / file.part
            if size_of(part) > file.size:
                part.unlink()  # from a server that sent too much; nothing can be made of it
            if path.is_file():
                self.replaced += path.stat().st_size if path.stat().st_nlink == 1 else 0
            self.done[file.name] = size_of(part)
            left = file.size - size_of(part)
            if left and (cached := hub.in_cache(file)):
                self.cached[file.name] = cached
                if cached.stat().st_dev != folder.stat().st_dev:
                    self.needed += left
            else:
                self.to_come += left
                self.needed += left

    def one(self, file: File) -> None:
        """A whole file, its hash checked; what came before an interruption is kept. Raises Failure."""
        path, part, hub = self.folder / file.name, self.folder / file.part, self.hub
        cached, damaged = self.cached.get(file.name), False

        def seen(size: int) -> None:
            self.done[file.name] = size

        path.unlink(missing_ok=True)
        while True:
            if cached and size_of(part) != file.size:
                self.copy(cached, part)
            if not part.is_file() or size_of(part) < file.size:
                hub.patiently(file.name, lambda: hub.receive(file, part, seen), lambda: size_of(part))
            if hash_of(part, file) == file.hash:
                break
            part.unlink()
            if damaged:
                raise Failure(1, f"{path} came damaged twice (its hash is not what the hub says) and was deleted; run "
                                 "this again later")
            if cached is None:
                damaged = True
                hub.notes.append(f"{file.name} came damaged and is fetched once more")
            cached = None
        part.replace(path)
        self.verified.add(file)
        self.done[file.name] = file.size

    def copy(self, cached: Path, part: Path) -> None:
        part.unlink(missing_ok=True)
        try:
            os.link(cached, part)  # no second copy on the same disk
        except OSError:
            shutil.copyfile(cached, part)

    def all(self, files: Iterable[File], draw: Callable[[], None]) -> None:
        """Several files at a time, `draw` called meanwhile. The first error stops the others and is raised."""
        waiting, failures = deque(files), []

        def work() -> None:
            while waiting and not self.hub.stop.is_set():
                try:
                    self.one(waiting.popleft())
                except (IndexError, Stopped):
                    return
                except Exception as error:  # the main thread says it
                    failures.append(error)
                    self.hub.stop.set()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(AT_ONCE, len(waiting)))]
        try:
            for thread in threads:
                thread.start()
            while running := [thread for thread in threads if thread.is_alive()]:
                running[0].join(0.1)
                self.hub.tell()
                draw()
        except BaseException:
            self.hub.stop.set()
            until = time.monotonic() + 0.5
            for thread in threads:  # a thread that still waits for the network is a daemon and ends with the program
                if thread.ident:
                    thread.join(max(until - time.monotonic(), 0))
            raise
        self.hub.tell()
        if failures:
            raise failures[0]
