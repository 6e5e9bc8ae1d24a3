"""FP8 to a wider type on a CPU, in pieces that stay in its cache, by shifting bits.

PyTorch converts FP8 one number at a time. But a float16 has the same bits in the same order, with one more for the
exponent and seven more for the mantissa:

    e4m3       s eeee mmm            2^(e - 7)  * 1.mmm,   2^-6  * 0.mmm where e is 0, NaN where all seven are 1
    float16    s 0eeee mmm0000000    2^(e - 15) * 1.mmm,   2^-14 * 0.mmm where e is 0

So 256 times the float16 is the number, exactly, but for NaN. The scales take over the 256:

    W = scale * q = (256 scale) * float16(q's bits)        in float32, rounded once
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 2**20  # weights for one matmul: 2 MB in bfloat16
PART = 2**17  # weights of a thread for one of the small steps: all but the first read what the one before wrote


def can_widen(weight: Tensor, scale: Tensor) -> bool:
    """Whether `pieces` is for this W: not on a GPU, nor while compiling; and no scale may overflow."""
    if weight.device.type != "cpu" or torch.compiler.is_compiling() or weight.numel() == 0:  # as a rank's share may be
        return False
    return not scale.float().abs().max() > 2.0**119


def pieces(weight: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int],
           W: Tensor | None = None) -> Iterator[Tensor]:
    """The W (O, I) of quantized.dequantize in pieces of some rows, bit for bit.

    They are views of `W`, (O, I); or of one buffer, so that each piece is gone when the next one is asked for.
    """
    (O, I), scale = weight.shape, 256 * scale.float()
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(block[1], 1)[:, :I]
    step, part = (min(max(size // I, 1), O) for size in (PIECE, PART * torch.get_num_threads()))
    buffer = torch.empty(step, I, dtype=dtype) if W is None else None
    bits, wide = torch.empty(part, I, dtype=torch.int16), torch.empty(part, I)
    for first in range(0, O, step):
        q = weight[first:first + step].view(torch.int8)
        out = buffer[:len(q)] if W is None else W[first:first + step]
        for rows, scales in parts(first, len(q), part, block[0]):
            b, w = bits[:rows.stop - rows.start], wide[:rows.stop - rows.start]
            b.copy_(q[rows])  # with the sign in all of the upper bits
            b <<= 7
            b &= ~(1 << 14)  # of the sign's copies, one is where float16 has its first bit of the exponent
            w.copy_(b.view(torch.float16))
            w.unflatten(0, (scales.stop - scales.start, -1)).mul_(scale[scales][:, None])
            out[rows] = w
        if int(q.amax()) == 127 or int(q.view(torch.uint8).amax()) == 255:
            out[q & 127 == 127] = torch.nan
        yield out


def parts(first: int, count: int, part: int, block: int) -> Iterator[tuple[slice, slice]]:
    """(Rows of a piece that begins at row `first` of W, those of their scales): whole blocks, or some rows of one."""
    start = 0
    while start < count:
        end, begun = min(start + part, count), (first + start) % block
        end = min(end, start + block - begun) if begun or end - start < block else end - (end - start) % block
        yield slice(start, end), slice((first + start) // block, (first + end - 1) // block + 1)
        start = end
