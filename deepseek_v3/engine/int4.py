"""Weights as small integers: four or eight bits each, and a scale for each group of them.

    W[o, i] = scale[o, g] * (q[o, i] - zero[o, g])        g = i // group: neighbours in a row share scale and zero

    by hand, four bits, group = 8, zero = 8:
        W            0.31  -0.70   0.12   0.06  -0.24   0.56  -0.08   0.40
        scale        0.1                                                          0.70 / 7
        q              11      1      9      9      6     14      7     12      round(W / scale) + zero, in 0…15
        scale (q-8)   0.3   -0.7    0.1    0.1   -0.2    0.6   -0.1    0.4      off by at most scale / 2

Decoding reads every weight once a token: 4 bits and the scales are a third of the bytes, and up to three times as fast.
What differs between the published formats is only where the bits lie (packed_formats.py); all become `Integers`.

    one row        PyTorch's matmul on four bits, in bfloat16, on the CPU: it sums x (scale (q - 8) + offset)
    many rows      dequantise a piece of W, multiply, take the next: the kernel would take longer than a matmul

The kernel wants the values in an order of its own (`pack`): made once, from the file, when a layer is first used.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .fast import matmul
from .nibbles import join_nibbles, look_up

FEW = {4: 96, 8: 16}  # bits -> up to so many rows of x PyTorch's kernel is faster than dequantising
GROUPS = (256, 128, 64, 32)  # that the kernel knows
PIECE = 2**22  # weights that are dequantised at a time: 8 MB in bfloat16; with fewer, matmuls lose more than it saves


class Integers(NamedTuple):
    """A matrix W (O, I) as its format means it, whatever the order of its bits was."""

    values: Tensor  # (O, I): uint8 with 0…15, or int8
    scale: Tensor  # (O, G)
    zero: Tensor  # (O, G), in the type of the values
    group: int  # columns that share a scale
    group_of: Tensor | None = None  # (I,), where the columns of a group are not neighbours (GPTQ's desc_act)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (O, I), computed exactly, then rounded once to `dtype`."""
        columns = torch.arange(self.values.shape[1], device=self.values.device)
        group_of = columns // self.group if self.group_of is None else self.group_of
        q, zero = self.values.short(), self.zero.short()  # differences of int8 reach 255
        return ((q - zero[:, group_of]) * self.scale.float()[:, group_of]).to(dtype).contiguous()

    def sorted_by_group(self) -> tuple["Integers", Tensor | None]:
        """Groups of neighbours, and the order of the columns that makes them so; None: as they were.

        Of all columns that a rank has there may be none of some groups.
        """
        if self.group_of is None or is_in_order(self.group_of, self.group):
            return self._replace(group_of=None), None
        order = self.group_of.argsort(stable=True)
        used, group_of = self.group_of[order].unique_consecutive(return_inverse=True)
        return Integers(self.values[:, order], self.scale[:, used], self.zero[:, used], self.group, group_of), order


def is_in_order(group_of: Tensor, group: int) -> bool:
    """Whether the columns of each group are neighbours, and the groups one after the other."""
    columns = torch.arange(len(group_of), dtype=group_of.dtype, device=group_of.device)
    return torch.equal(group_of, columns // group)


@functools.cache
def layout() -> tuple[int, int] | None:
    """How this processor's kernel wants four-bit values: (rows of a block, axis of `nibbles`); None without a kernel.

    A block of rows is stored column by column. A byte holds rows j and j + block/2 (axis -2), or 2j and 2j + 1 (-1).
    """
    q = torch.arange(64 * 32).view(64, 32) % 67 % 16  # no two rows alike: what gives the kernel's bytes is its order
    try:
        wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1).flatten()
    except (AttributeError, RuntimeError):  # this PyTorch has none
        return None
    known = [(block, axis) for block in (64, 32, 16) for axis in (-2, -1)]
    return next((one for one in known if torch.equal(join_nibbles(q.byte(), *one).flatten(), wanted)), None)


# Two numbers of so many bytes are moved as one.
PAIRS = {1: torch.int16, 2: torch.int32, 4: torch.int64, 8: torch.complex128}


def to_words(rows: Tensor, half: int, axis: int) -> Tensor:
    """(…, O) as W has its rows -> as `look_up` gives them: for axis -2 two, and two of the block's other half."""
    if axis == -1:
        return rows
    pairs = rows.contiguous().flatten().view(PAIRS[rows.itemsize])
    return pairs.view(*rows.shape[:-1], -1, 2, half // 2).mT.flatten(-3).view(rows.dtype)


def times(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q * scale in `dtype`, rounded once: integers of eight bits are exact in every type."""
    return q.to(dtype) * scale if scale.dtype == dtype else (q * scale.float()).to(dtype)


class Packed(NamedTuple):
    """Integers as they are computed with: groups of neighbours; of four bits, whole blocks of rows."""

    values: Tensor  # four bits: bytes (O / block, I, block / 2); eight bits: int8 (O, I)
    scale: Tensor  # (G, O) beside four bits, (O, G) beside eight
    zero: Tensor | None  # int8, like the scale; None: 8 (four bits) or 0 (eight) everywhere
    rows: int  # O without padding
    group: int
    axis: int  # of `nibbles`
    order: Tensor | None  # of the columns
    kernel: tuple[int, Tensor] | None  # for PyTorch's kernel: its group, and scales and offsets (G, O, 2) or (O,)
    lost: Tensor | None = None  # (G, O), what rounding to bfloat16 took from the offsets; None without zero points

    def matmul(self, x: Tensor) -> Tensor:
        """x (n, I) -> x W^T (n, O)."""
        x = x if self.order is None else x[:, self.order]
        has_gradient = torch.is_grad_enabled() and x.requires_grad  # the kernels compute none
        known, bits = self.kernel is not None and x.dtype == torch.bfloat16, 8 if self.values.dtype == torch.int8 else 4
        if not known or x.shape[0] > FEW[bits] or has_gradient:
            if known and bits == 8:  # a row of W has one scale, so a column of y has it too
                pieces = self.values.split(max(PIECE // self.values.shape[1], 1))
                return torch.cat([matmul(x, q.to(x.dtype)) for q in pieces], -1) * self.kernel[1]
            return self.in_order(torch.cat([matmul(x, W) for W in self.pieces(x.dtype)], -1))[:, :self.rows]
        (group, scales), x = self.kernel, x.contiguous()
        if bits == 8:
            return torch.ops.aten._weight_int8pack_mm(x, self.values, scales)
        values = self.values.view(scales.shape[1], -1)  # (O, I / 2)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, values, group, scales)
        if self.lost is not None:  # one error for all columns of a group: it would add up where x has a mean
            y = torch.addmm(y, x.unflatten(1, (-1, self.group)).sum(-1), self.lost)
        return y[:, :self.rows]

    def in_order(self, y: Tensor) -> Tensor:
        """(…, O) of the rows of `pieces` -> in the order of W's rows."""
        if self.axis != -2:
            return y
        half = self.values.shape[2]
        if y.requires_grad:
            return y.unflatten(-1, (-1, half // 2, 2, 2)).transpose(-3, -2).flatten(-4)
        pairs = y.contiguous().flatten().view(PAIRS[y.itemsize])
        return pairs.view(*y.shape[:-1], -1, half // 2, 2).mT.flatten(-3).view(y.dtype)

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """W in pieces of some rows, (some, I) each: the numbers of Integers.matrix, rows as `look_up` gives them."""
        if self.values.dtype == torch.int8:
            for first in range(0, self.rows, step := max(PIECE // self.values.shape[1], 1)):
                rows = slice(first, first + step)
                q = self.values[rows].unflatten(1, (-1, self.group))
                q = q if self.zero is None else q.short() - self.zero[rows, :, None]
                yield times(q, self.scale[rows, :, None], dtype).flatten(1)
            return
        blocks, I, half = self.values.shape
        scale, zero = (t if t is None else to_words(t, half, self.axis)[:, None] for t in (self.scale, self.zero))
        step, buffers = max(PIECE // (I * 2 * half), 1), None
        for first in range(0, blocks, step):
            data = self.values[first:first + step].transpose(0, 1)  # (I, some blocks, half)
            if buffers is None or torch.is_grad_enabled():  # which keeps W; otherwise its memory is used again
                buffers = [torch.empty(data.numel() // 2, dtype=dtype) for dtype in (torch.int32, torch.int64)]
            rows = slice(first * 2 * half, (first + step) * 2 * half)
            q = look_up(data, self.axis, torch.bfloat16, *buffers).view(I // self.group, self.group, -1)  # less 8
            q = q if zero is None else q.add_(8 - zero[..., rows])  # exact too
            in_place = scale.dtype == dtype == q.dtype
            yield (q.mul_(scale[..., rows]) if in_place else times(q, scale[..., rows], dtype)).flatten(0, 1).T


def pack(integers: Integers) -> Packed | None:
    """The form to compute with; None where a group is not whole.

    PyTorch's kernel knows no zero points but 8 and an offset beside it: scale (q - zero) = scale (q - 8) + offset.
    """
    integers, order = integers.sorted_by_group()
    values, scale, zero, group, group_of = integers
    O, I = values.shape
    if I % group or group_of is not None and not is_in_order(group_of, group):
        return None
    bits, middle = (8, 0) if values.dtype == torch.int8 else (4, 8)
    zero = None if bool((zero == middle).all()) else zero.view(torch.int8)
    if bits == 8:
        is_known = group == I and zero is None and I % 32 == 0  # PyTorch checks none of it and reads beyond the end
        kernel = (group, scale[:, 0].bfloat16().contiguous()) if is_known else None
        return Packed(values.contiguous(), scale.contiguous(), zero, O, group, 0, order, kernel)
    (block, axis), kernel, lost = layout() or (64, -2), None, None
    if O % block:
        values, scale, zero = (t if t is None else torch.cat((t, t.new_zeros(-O % block, t.shape[1])))
                               for t in (values, scale, zero))
    scale, zero = scale.T.contiguous(), None if zero is None else zero.T.contiguous()
    size = next((size for size in GROUPS if group % size == 0), None)  # a larger group is several with one scale
    if layout() and size:
        scales = torch.stack((scale, torch.zeros_like(scale)), -1).bfloat16()
        if zero is not None:
            offset = (8 - zero) * scale.float()
            scales[..., 1] = offset  # rounded to bfloat16
            lost = (offset - scales[..., 1]).bfloat16()
        kernel = size, scales.repeat_interleave(group // size, 0) if group > size else scales
        if group == size and scale.dtype == torch.bfloat16:
            scale = scales[..., 0]  # the same numbers: not kept twice
    return Packed(join_nibbles(values, block, axis), scale, zero, O, group, axis, order, kernel, lost)
