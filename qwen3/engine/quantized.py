"""FP8 weights: eight bits a weight, and a scale that several of them share.

    W = scale * q       q in float8_e4m3fn; one scale for    the tensor   (1, 1)
                                                             each row     (O, 1)
                                                             each block   (ceil(O / 128), ceil(I / 128))
"""

import math

import torch
from torch import Tensor, nn

from ..layers import Linear

FP8 = torch.float8_e4m3fn


class FP8Linear(Linear):
    """y = x W^T with W (out, in) in FP8; dequantised as it is used. `block`: rows and columns that share a scale."""

    def __init__(self, linear: Linear, block: tuple[int, int]):
        nn.Module.__init__(self)
        self.weight, self.block = linear.weight, block
        self.register_parameter("weight_scale_inv", None)  # loading puts it there

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.weight, self.weight_scale_inv, dtype, self.block)

    # PyTorch's pickle (not torch.save) writes 8-bit floats and cannot read them: it gets their bytes.
    def __getstate__(self) -> dict:
        names = {name: p.dtype for name, p in self._parameters.items() if p is not None and p.dtype.itemsize == 1}
        return self.__dict__ | {"eight_bits": names, "_parameters": {
            name: p.data.view(torch.uint8) if name in names else p for name, p in self._parameters.items()}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name, dtype in self.__dict__.pop("eight_bits").items():
            self._parameters[name] = nn.Parameter(self._parameters[name].view(dtype), requires_grad=False)


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] = (128, 128)) -> Tensor:
    """FP8 (…, O, I) and scales (…, ceil(O/rows), ceil(I/columns)) -> weights (…, O, I).

    Multiplied, although files call it `weight_scale_inv`: that is the inverse of what the weights were divided by
    (DeepSeek-V3, arXiv:2412.19437, section 3.3). In float32, then rounded once.
    """
    scale = scale.float()
    for axis, size in ((-2, block[0]), (-1, block[1])):
        if size > 1 and scale.shape[axis] > 1:  # a single scale broadcasts; the last block may be cut short
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
    return (weight.float() * scale).to(dtype)


def block_of(weight: tuple[int, ...], scale: tuple[int, ...], announced: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by the shapes that are stored; None where they do not fit each other."""
    blocks = announced or (128, 128)
    grid = grid_of(weight, blocks)
    if math.prod(scale) == 1:
        return weight
    if scale in (weight[:1], (weight[0], 1)):
        return 1, weight[1]
    return blocks if [size for size in scale if size != 1] == [size for size in grid if size != 1] else None  # (…, 1, …, 1) too


def grid_of(weight: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many scales there are, along rows and along columns."""
    return math.ceil(weight[0] / block[0]), math.ceil(weight[1] / block[1])


def swap_in_fp8(model: nn.Module, name: str, block: tuple[int, int]) -> None:
    """Replace the Linear at `name` by one of FP8, before anything is loaded."""
    parent, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, leaf, FP8Linear(getattr(parent, leaf), block))
