"""A matrix becomes small integers: each to its nearest, with the scale of a group searched for the least error.

    W (O, I)  ->  q = round(W / scale), from -8 to 7 in four bits,  W' = scale q

The largest value over 7 would be the scale that cuts nothing off. A smaller one cuts the largest values, of which there
are few, and is finer for all the others: what is smallest is the sum of (W - W')² over the group, for some scales that
are tried. The result is stored as compressed-tensors' pack-quantized (packed_formats.py).
"""

import torch
from torch import Tensor


BITS = {"int4": 4, "int8": 8}  # the types that are asked for by name
GROUP = 32  # columns that share a scale in four bits; in eight bits a whole row does
# Bits -> the step from one scale that is tried to the next. Checkpoints have 4 or 8; the others are measured.
SHRINK = {2: 0.04, 3: 0.035, 4: 0.025, 5: 0.02, 6: 0.015, 8: 0.01}
TRIES = 16
PIECE = 2**17  # weights at a time: what is computed of them in float32 stays in a processor's cache


def is_rounded(name: str, shape: tuple[int, ...], group: int = GROUP) -> bool:
    """Whether a weight of this name becomes integers: the matrices of attention, MLPs and experts.

    Norms, routers and the embedding stay as they are; and a head, which is large, but matters most.
    """
    return "_proj" in name and name.endswith(".weight") and len(shape) == 2 and shape[1] % group == 0


@torch.no_grad()
def round_matrix(W: Tensor, bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """W (O, I) -> q (O, I) int8, scale (O, I / group) in `dtype`."""
    q, scale = torch.empty(W.shape, dtype=torch.int8), torch.empty(len(W), W.shape[1] // group, dtype=dtype)
    step = max(PIECE // W.shape[1], 1)
    for rows in (slice(first, first + step) for first in range(0, len(W), step)):
        q[rows], scale[rows] = round_rows(W[rows], bits, group, dtype)
    return q, scale


def round_rows(W: Tensor, bits: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`round_matrix` for as many rows as are computed at a time."""
    most = 2 ** (bits - 1) - 1
    W = W.float().unflatten(1, (-1, group))  # (O, G, group)
    largest = W.abs().amax(-1, keepdim=True) / most
    if not bool(largest.isfinite().all()):
        raise ValueError("a matrix of this checkpoint has numbers that are infinite or NaN; download it again")
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for number in range(TRIES):
        scale = (largest * (1 - number * SHRINK[bits])).to(dtype).float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros, or too small for the type
        error = nearest(W, scale, most).mul_(scale).sub_(W).square_().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return nearest(W, best, most).to(torch.int8).flatten(1), best[..., 0].to(dtype)


def nearest(W: Tensor, scale: Tensor, most: int) -> Tensor:
    return (W * (1 / scale)).round_().clamp_(-most - 1, most)


@torch.no_grad()
def packed_tensors(W: Tensor, bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """W (O, I) rounded, as compressed-tensors stores it; in eight bits a row shares a scale, whatever the group is."""
    (O, I), group = W.shape, group if bits == 4 else W.shape[1]
    words = torch.empty(O, -(-I * bits // 32), dtype=torch.int32)
    scale = torch.empty(O, I // group, dtype=dtype)
    step = max(PIECE // I, 1)
    for rows in (slice(first, first + step) for first in range(0, O, step)):  # the whole W in int8 would be large
        q, scale[rows] = round_rows(W[rows], bits, group, dtype)
        data = torch.nn.functional.pad((q + 8 if bits == 4 else q).view(torch.uint8), (0, -I % (32 // bits)))
        if bits == 4:
            low, high = data.unflatten(1, (-1, 2)).unbind(-1)
            data = low | high << 4
        words[rows] = (data if bits == 4 else data ^ 128).contiguous().view(torch.int32)
    return {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor(W.shape)}
