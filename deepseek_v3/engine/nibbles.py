"""Two values of four bits in a byte: apart, and together again."""

import functools

import torch
from torch import Tensor


def nibbles(data: Tensor, axis: int = -1) -> Tensor:
    """Bytes (…, n) -> their halves (…, 2n), the lower one first: in turn (axis -1), or all lower ones first (-2)."""
    return torch.stack((data & 15, data >> 4), axis).flatten(-2)


def join_nibbles(values: Tensor, block: int, axis: int) -> Tensor:
    """(O, I) with 0…15, O a multiple of the block -> bytes (O / block, I, block / 2); `nibbles` goes back."""
    pairs = values.unflatten(0, (-1, 2, block // 2) if axis == -2 else (-1, block // 2, 2))
    low, high = pairs.unbind(axis - 1)
    return (low | high << 4).mT.contiguous()


@functools.cache
def table(axis: int, dtype: torch.dtype) -> Tensor:
    """For each of 65,536 pairs of bytes its four values: as bytes in an int32, or less 8, as bfloat16 in an int64."""
    data = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2)
    values = nibbles(data, axis)
    values = values if dtype == torch.uint8 else (values.view(torch.int8) - 8).to(dtype)
    return values.contiguous().view({1: torch.int32, 2: torch.int64}[dtype.itemsize]).flatten()


def look_up(data: Tensor, axis: int, dtype: torch.dtype, words: Tensor | None = None,
            found: Tensor | None = None) -> Tensor:
    """`nibbles` of bytes (…, 2), flat: looked up in a table, which is faster than computing them.

    words int32 and found int64 may be memory for the work, of data.numel() / 2 elements or more.
    """
    data, values = data.view(torch.uint16), table(axis, dtype)
    if words is None:
        words, found = (torch.empty(data.numel(), dtype=kind) for kind in (torch.int32, values.dtype))
    words, found = words[:data.numel()], found[:data.numel()]
    words.view(data.shape).copy_(data)
    return torch.index_select(values, 0, words, out=found).view(dtype)
