"""Several processes train one model: each has some rows of every batch, and their gradients are added up.

    uv run torchrun --nproc-per-node 2 -m scripts.train qwen3

    process 0    rows 0, 2, 4, … of the batch ── forward, backward ── its part of each gradient ──┐
                                                                                                  ├── the sum ── a step
    process 1    rows 1, 3, 5, …              ── forward, backward ── its part of each gradient ──┘

All make the same batch, from its seed, and begin with the same weights. Rows have different numbers of targets, so a
mean of the processes' means would be another loss. Instead each divides by the number of targets in the whole batch,
and the parts add up to the loss and the gradients of the whole. So all make the same step, and their weights stay the
same. (PyTorch's DistributedDataParallel adds up while backward is still working; see scripts/parallel/train.py.)
Without torchrun nothing here does anything.
"""

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def ranks() -> int:
    """How many processes train."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def is_first() -> bool:
    """The first process alone prints, asks and writes."""
    return rank() == 0


def on_this_machine() -> int:
    """How many of the processes share this machine's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or ranks()) if ranks() > 1 else 1


def own_rows() -> slice:
    """Which rows of a batch are this process's."""
    return slice(rank(), None, ranks())


def check_rows(lengths: Iterable[int], tokens: int) -> None:
    """ValueError where a step has fewer rows than there are processes; `lengths`: those that rows may have."""
    longest = max(lengths)
    rows = max(1, tokens // longest)
    if rows < ranks():
        raise ValueError(f"{ranks()} processes cannot share a step of {tokens} tokens, which may be {rows} "
                         f"row{'s' * (rows > 1)} of {longest}; start {rows}, or give --tokens {ranks() * longest}")


def summed(part: Tensor) -> Tensor:
    """The sum over all processes; it has no gradient."""
    if ranks() == 1:
        return part
    whole = part.detach().clone()
    dist.all_reduce(whole)
    return whole


def add_up(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over all processes, which have the same ones in the same order."""
    if ranks() > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def like_first(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes that of the first process: other processors draw other random numbers."""
    if ranks() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def of_first(make: Callable[[], T]) -> T:
    """What `make()` returns in the first process, in every one."""
    if ranks() == 1:
        return make()
    box = [make() if is_first() else None]
    dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


def any_of(flag: bool) -> bool:
    """Whether it is true in one of the processes."""
    return bool(summed(torch.tensor(int(flag))))


def wait() -> None:
    """For all the others to come here."""
    any_of(False)
