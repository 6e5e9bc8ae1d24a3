"""One program in several processes: how they meet, which of them reads and speaks, and how they end together.

`torchrun --nproc-per-node 8 -m qwen3.main …` starts the program eight times, on several machines with --nnodes more
often. Environment variables say which process is which, and srun and mpirun can set them too:

    WORLD_SIZE    all processes, of all machines       LOCAL_WORLD_SIZE    those of this machine
    RANK          the number of this one, from 0       LOCAL_RANK          its number on its machine: its GPU

All of them run the same lines with the same inputs. Only rank 0 reads what is typed, prints answers and notes, and
draws by chance; the others are told. An error that all have is said by rank 0, one that a single process has by that
one. parallel.py is what the processes compute together; this file knows nothing of models.
"""

import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

TO_COME = 120  # seconds in which all processes have to be there
TO_THINK = timedelta(days=7)  # how long one may wait for another, as the others do while a question is typed
GRACE = 1.0  # seconds that a process which failed leaves to one that knows better why
LOST = re.compile(r"(closed|reset) by peer|broken pipe|remote process exited|gloo|socket (timeout|error)", re.I)

GROUP = None  # of torch.distributed: the processes that share each model that is loaded from now on
STORE = None  # where processes that have met leave short messages
HUSHED = None  # the standard error of a process that is quiet
LEAVING = threading.Event()  # set where the work is done


def started() -> int:
    """How many processes share a model, as the variables say; ValueError where they do not say it in numbers.

    Replicas, each with a model of its own, are none of them (replicas.py).
    """
    if any(word.startswith("--data-parallel") for word in sys.argv[1:]):
        return 1
    try:
        world = int(os.environ.get("WORLD_SIZE") or 1)
        number = int(os.environ.get("RANK") or 0) if world > 1 else 0
    except ValueError:
        world = number = 0
    if not 0 <= number < world:
        raise ValueError("WORLD_SIZE and RANK, which say how many processes there are and which is this one, are not "
                         "such numbers; start them by torchrun, or unset both")
    return world


def share_models(group) -> None:
    """From now on the processes of `group`, of torch.distributed, share each model that they load.

    Nothing is shared before, so that other programs, such as training, may have process groups of their own.
    """
    global GROUP
    GROUP = group


def ranks() -> int:
    """How many processes share a model; 1 for a program by itself."""
    return 1 if GROUP is None else GROUP.size()


def rank() -> int:
    """The number of this process among them, from 0."""
    return 0 if GROUP is None else GROUP.rank()


def on_this_machine() -> range:
    """All processes of this machine, by RANK."""
    number, count, local = (int(os.environ.get(name) or default) for name, default in (
        ("RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return range(number - local, number - local + count) if GROUP is not None else range(1)


def be_quiet() -> None:
    """All processes but the first read nothing and write to nowhere."""
    global HUSHED
    with suppress(ValueError):  # said when they should meet
        if started() > 1 and os.environ.get("RANK", "0") != "0":
            HUSHED = sys.stderr
            sys.stdout = sys.stderr = open(os.devnull, "w")
            sys.stdin = open(os.devnull)


# Meeting

def join() -> None:
    """Meet the other processes, if there are any; ValueError where some of them do not come."""
    global STORE
    world = started()
    if world == 1:
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun ends all of them at Ctrl-C, and none waits for another
    import torch
    import torch.distributed as dist

    number = int(os.environ.get("RANK") or 0)  # where it is missing, the next lines say so
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=TO_COME)))
        store.set(f"came/{number}", "")
        with suppress(RuntimeError):  # a timeout
            store.wait([f"came/{each}" for each in range(world)], timedelta(seconds=TO_COME))
        missing = [str(each) for each in range(world) if not store.check([f"came/{each}"])]
    except (RuntimeError, ValueError) as error:
        raise ValueError(why_not(str(error))) from None
    if missing:
        raise ValueError(why_not(f"{world - len(missing)}/{world} clients joined, without rank {missing[0]}"))
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    # Numbers go from GPU to GPU by NCCL; between CPUs, and what is typed, by gloo, where waiting keeps no GPU busy.
    stdout = os.dup(1)
    os.dup2(2, 1)  # gloo says there that it is connected, in PyTorch 2.9, and only the answer belongs there
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=number, world_size=world,
                            timeout=TO_THINK)
    os.dup2(stdout, 1)
    os.close(stdout)
    STORE = store
    share_models(dist.group.WORLD)
    end_slowly()
    threading.Thread(target=watch, daemon=True).start()


def watch() -> None:
    """End this process, which may be waiting for another, where the first has nothing more to do, or all is lost."""
    import torch.distributed as dist

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:  # by a connection of its own, since it waits
        dist.TCPStore(*address, is_master=False, timeout=TO_THINK).wait(["dismissed"])
        time.sleep(0 if int(os.environ["RANK"]) else GRACE / 2)  # it may be the one that keeps the messages
        os._exit(0)
    except RuntimeError:  # whoever keeps the messages, torchrun or rank 0, is gone
        if not LEAVING.wait(GRACE):
            os._exit(1)


def end_slowly() -> None:
    """Leave some time to say what was lost, though torchrun ends all (SIGTERM) as soon as one process ends."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)  # written to at once, also while the main thread waits for a sum
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while os.read(told, 1) != bytes([signal.SIGTERM]):  # a byte for each signal that is handled, Ctrl-C too
            pass
        time.sleep(2 * GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def why_not(error: str) -> str:
    """In one sentence, why the processes cannot meet."""
    host, port = (os.environ.get(name, "?")[:60] for name in ("MASTER_ADDR", "MASTER_PORT"))
    if re.search("EADDRINUSE|address already in use", error, re.I):
        return f"port {port}, where the processes would meet, is taken on this machine; --master-port chooses another"
    if missing := re.search(r"environment variable (\w+) expected", error):
        return f"{missing[1]} is not set, which says where the processes meet; torchrun sets it"
    if came := re.search(r"(\d+)/(\d+) clients joined", error):
        return (f"only {came[1]} of {came[2]} processes came within {TO_COME} seconds; start them on all machines, "
                "with the same --nnodes and --master-addr")
    return (f"rank 0 was not found at {host}, port {port}, within {TO_COME} seconds; start it there, and check "
            "--master-addr and --master-port")


def device_of(name: str | None) -> str:
    """Each process has a GPU of its own, or all compute on CPUs; ValueError for anything else."""
    import torch

    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"-d {name[:40]} is one device, and there are {ranks()} processes; leave it out, and each "
                         "takes a GPU of its own, or give -d cpu")
    gpus, here = torch.cuda.device_count() if torch.cuda.is_available() else 0, on_this_machine()
    if name == "cuda" and not gpus:
        return name  # which is refused as always
    if name != "cpu" and 0 < gpus < len(here):
        raise ValueError(f"{len(here)} processes on this machine have {gpus} GPU{'s' * (gpus > 1)}; start one for "
                         "each, or give -d cpu")
    if gpus and name != "cpu" and "LOCAL_RANK" not in os.environ:
        raise ValueError("LOCAL_RANK is not set, which says which GPU is this process's; torchrun sets it")
    device = f"cuda:{int(os.environ['LOCAL_RANK'])}" if gpus and name != "cpu" else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    return device


# Together

def on_first(read: Callable[[], T]) -> T:
    """What `read()` returns on the first process, on every one; the end of the input (EOFError) is shared too."""
    if ranks() == 1:
        return read()
    import torch
    import torch.distributed as dist

    box = [None]
    if rank() == 0:
        try:
            box = [read()]
        except EOFError:
            box = [EOFError]
    dist.broadcast_object_list(box, group=GROUP, group_src=0, device=torch.device("cpu"))
    if box[0] is EOFError:
        raise EOFError
    return box[0]


def of_all(value: T) -> list[T]:
    """What each process has, by its number."""
    if ranks() == 1:
        return [value]
    import torch.distributed as dist

    every: list = [None] * ranks()
    dist.all_gather_object(every, value, GROUP)
    return every


def check_alike(what: str, value: object) -> None:
    """ValueError, on every process, unless all have the same: later they would wait for each other for ever."""
    every = of_all(hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest())
    if others := [number for number, one in enumerate(every) if one != every[0]]:
        raise ValueError(f"rank {others[0]} has not the {what} of rank 0; start the same command with the same files "
                         "on every machine")


# Ending

def is_lost(error: Exception) -> bool:
    """Whether an error only says that another process has ended."""
    return STORE is not None and isinstance(error, RuntimeError) and bool(LOST.search(str(error)))


def who_speaks(lost: bool = False) -> str | None:
    """Of several processes that fail, the first with a reason of its own says it: "" or ", rank 3"; None for silence.

    One that has only lost another leaves the word to that, and speaks if nobody else does: one that is killed cannot.
    """
    if HUSHED is None and STORE is None:  # alone, or the first, which has not met the others
        return ""
    number, speaks = int(os.environ["RANK"]), os.environ.get("LOCAL_RANK", "0") == "0"
    with suppress(RuntimeError):  # the machine that keeps the messages is gone
        if STORE is not None:
            key, every = "failed/{}".format, range(started())
            STORE.set(key(number), "lost" if lost else "own")
            if number or lost:
                time.sleep(GRACE)
            failed = {each: STORE.get(key(each)) for each in every if STORE.check([key(each)])}
            speaks = number == min([each for each, why in failed.items() if why == b"own"] or failed)
    if not speaks:
        return None
    sys.stderr = HUSHED or sys.stderr
    return f", rank {number}" if number else ""


def dismiss() -> int:
    """Whoever reads the answer has left, as `head` does: all processes end, and none has failed."""
    if STORE is not None:
        STORE.set("dismissed", "")
        time.sleep(60)  # `watch` ends this
    return 0


def leave(code: int) -> int:
    """The exit code of a program by itself. Several processes end here: together, or at once where one fails."""
    with suppress(ValueError):  # which was said
        if started() == 1:
            return code
    if STORE is not None and code == 0:
        import torch
        import torch.distributed as dist

        LEAVING.set()
        with suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))  # nobody hangs up while another still listens
        os._exit(0)  # without taking the group down, which waits for graphs that hold its sums
    if os.environ.get("RANK") != "0":
        time.sleep(GRACE)  # the first may have something to say, and torchrun ends all when one ends
    os._exit(code or 1)  # never 0, with which torchrun would let the others wait
