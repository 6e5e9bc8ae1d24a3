"""Linear layers whose weights are stored in fewer bits, and dequantised as they are used.

`QuantizedLinear` is what loading and compiling know of all of them. FP8 is one of them: eight bits a weight, and a
scale that several weights share. Small integers are in int4.py.

    W = scale * q       q in float8_e4m3fn; one scale for    the tensor   (1, 1)
                                                             each row     (O, 1)
                                                             each block   (ceil(O / 128), ceil(I / 128))
"""

import math

import torch
from torch import Tensor, nn

from ..config import Config
from .fast import FastLinear, matmul
from .fp8 import can_widen, pieces
from .safetensors_reader import CheckpointFiles

FP8 = torch.float8_e4m3fn
FEW = 128  # rows up to which W is multiplied in pieces: with more, PyTorch's sums depend on the size of a piece
# What an axis of a stored tensor counts: rows of W, its columns, or the groups of columns that share a scale; and how
# many rows or columns one entry is for, 0 if there is only one for all.
ROWS, COLUMNS, COLUMN_GROUPS = range(3)
Axes = tuple[tuple[int, int], ...]


class QuantizedLinear(FastLinear):
    """y = x W^T with a W that `matrix(dtype)` computes from what the checkpoint stores for it.

    A subclass says by `layout` which tensors it finds in a checkpoint, takes these in its constructor, and keeps them
    as parameters under the checkpoint's names, in their own types and without gradients.
    """

    def __init__(self, **tensors: Tensor):
        nn.Module.__init__(self)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @staticmethod
    def layout(files: CheckpointFiles, name: str, shape: tuple[int, int], config: Config) -> dict[str, Axes] | None:
        """What is stored for the Linear `name` with a W of `shape`: parameter -> its axes; None for another format.

        Shares are cut by it (shares.py). Raises ValueError for a damaged or unannounced format.
        """
        raise NotImplementedError

    @classmethod
    def stored(cls, files: CheckpointFiles, name: str, shape: tuple[int, int],
               config: Config) -> dict[str, tuple[int, ...]] | None:
        """The same: parameter -> its shape."""
        layout = cls.layout(files, name, shape, config)
        return layout and {leaf: tuple(entries(shape, *axis) for axis in axes) for leaf, axes in layout.items()}

    @classmethod
    def make(cls, config: Config, shape: tuple[int, int], **tensors: Tensor) -> "QuantizedLinear":
        """Of the tensors that `layout` names, for a W of `shape`, which may be a share of the whole."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in `dtype`."""
        raise NotImplementedError

    # PyTorch's pickle (not torch.save) writes 8-bit floats and cannot read them: it gets their bytes.
    def __getstate__(self) -> dict:
        names = {name: p.dtype for name, p in self._parameters.items() if p.dtype.itemsize == 1}
        return self.__dict__ | {"eight_bits": names, "_parameters": {
            name: p.data.view(torch.uint8) if name in names else p for name, p in self._parameters.items()}}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for name, dtype in self.__dict__.pop("eight_bits").items():
            self._parameters[name] = nn.Parameter(self._parameters[name].view(dtype), requires_grad=False)


class FP8Linear(QuantizedLinear):
    """W in FP8. How many rows and columns share a scale follows from the shapes, and from what the config announces."""

    def __init__(self, config: Config, weight: Tensor, weight_scale_inv: Tensor):
        super().__init__(weight=weight, weight_scale_inv=weight_scale_inv)
        self.block = block_of(tuple(weight.shape), tuple(weight_scale_inv.shape), config.weight_block_size)

    @staticmethod
    def layout(files: CheckpointFiles, name: str, shape: tuple[int, int], config: Config) -> dict[str, Axes] | None:
        """As QuantizedLinear.layout, for FP8 with a scale for each block, row or tensor. Raises ValueError."""
        weight, scale = (files.tensors.get(f"{name}.{leaf}") for leaf in ("weight", "weight_scale_inv"))
        if weight is None or weight.dtype != FP8:
            return None
        if config.quantization != "fp8":
            raise ValueError(f"{weight.path}: {name}.weight is FP8, which config.json's quantization_config does not "
                             "announce")
        block = block_of(shape, scale.shape, config.weight_block_size) if scale else (1, 1)
        if block is None:
            raise ValueError(f"{scale.path}: {name}.weight_scale_inv has shape {scale.shape}, no scale for each block, "
                             f"row or tensor of {shape}")
        if block != (config.weight_block_size or (128, 128)):  # blocks stay whole, even where there is only one
            block = [0 if size == whole else size for size, whole in zip(block, shape)]
        return {"weight": ((ROWS, 1), (COLUMNS, 1)), "weight_scale_inv": ((ROWS, block[0]), (COLUMNS, block[1]))}

    @classmethod
    def make(cls, config: Config, shape: tuple[int, int], **tensors: Tensor) -> "FP8Linear":
        return cls(config, **tensors)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        if not can_widen(self.weight, self.weight_scale_inv):
            return dequantize(self.weight, self.weight_scale_inv, dtype, self.block)
        W = torch.empty(self.weight.shape, dtype=dtype)
        for _ in pieces(self.weight, self.weight_scale_inv, dtype, self.block, W):
            pass
        return W

    def forward(self, x: Tensor) -> Tensor:
        has_gradient = torch.is_grad_enabled() and x.requires_grad  # for which all of W would be kept
        many = x.shape[:-1].numel() > FEW
        if many or has_gradient or not can_widen(self.weight, self.weight_scale_inv):
            return super().forward(x)
        return torch.cat([matmul(x, W) for W in pieces(self.weight, self.weight_scale_inv, x.dtype, self.block)], -1)


def entries(shape: tuple[int, int], counts: int, size: int) -> int:
    """How many entries an axis has that counts rows, columns or groups of columns of a W of `shape`."""
    return math.ceil(shape[min(counts, COLUMNS)] / size) if size else 1


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype, block: tuple[int, int] = (128, 128)) -> Tensor:
    """FP8 (…, O, I) and scales (…, ceil(O/rows), ceil(I/columns)) -> weights (…, O, I).

    Multiplied, although files call it `weight_scale_inv`: that is the inverse of what the weights were divided by
    (DeepSeek-V3, arXiv:2412.19437, section 3.3). In float32, then rounded once.
    """
    scale = scale.float()
    for axis, size in ((-2, block[0]), (-1, block[1])):
        if size > 1 and scale.shape[axis] > 1:  # a single scale broadcasts; the last block may be cut short
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
    return weight.float().mul_(scale).to(dtype)  # in place: another float32 tensor would cost up to as much time again


def block_of(weight: tuple[int, ...], scale: tuple[int, ...],
             announced: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by the shapes that are stored; None where they do not fit each other."""
    blocks = announced or (128, 128)
    grid = grid_of(weight, blocks)
    if math.prod(scale) == 1:
        return weight
    if scale in (weight[:1], (weight[0], 1)):
        return 1, weight[1]
    without_ones = [size for size in scale if size != 1], [size for size in grid if size != 1]  # (…, 1, …, 1) too
    return blocks if without_ones[0] == without_ones[1] else None


def grid_of(weight: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many scales there are, along rows and along columns."""
    return math.ceil(weight[0] / block[0]), math.ceil(weight[1] / block[1])
