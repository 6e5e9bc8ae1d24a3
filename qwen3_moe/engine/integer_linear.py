"""A Linear with a W of small integers: packed at first use, in as much memory as there is.

The parameters are the checkpoint's own tensors, on the CPU in the mapped file. What is computed with is made from them
(int4.pack) and lies in memory once more. Of a mixture of experts larger than memory not all can be kept: `Budget` then
forgets the experts that were not used for the longest time, and they are packed again when a token wants them.
"""

import threading

import torch
from torch import Tensor

from .int4 import Integers, Packed, pack
from .quantized import QuantizedLinear


class IntegerLinear(QuantizedLinear):
    """y = x W^T with a W of small integers. A subclass knows how its format stores them."""

    packed: Packed | bool | None = None  # made at first use, from the parameters; False: it cannot be
    budget: "Budget | None" = None

    def __init__(self, shape: tuple[int, int], group: int | None, **tensors: Tensor):
        super().__init__(**tensors)
        self.shape = shape  # of W, or of a rank's share, which may be empty
        self.group = group or 1  # columns that share a scale, unless g_idx names each column's group

    def integers(self) -> Integers:
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype) -> Tensor:
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=dtype, device=next(self.parameters()).device)
        return self.integers().matrix(dtype)

    def pack(self) -> Packed | bool:
        packed = self.packed
        if packed is None:
            with torch.inference_mode(False), torch.no_grad():  # it is kept, also for a forward with gradients
                packed = self.packed = 0 not in self.shape and pack(self.integers()) or False
        if self.budget is not None and packed:
            self.budget.use(self, packed)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        packed = self.pack() if x.device.type == "cpu" else False
        if not packed:
            return super().forward(x)
        return packed.matmul(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def train(self, mode: bool = True) -> "IntegerLinear":
        if mode:
            raise ValueError("weights of 4 or 8 bits cannot be trained; start from the release in bfloat16")
        return super().train(mode)

    def _apply(self, *arguments, **more) -> "IntegerLinear":  # what .to() and its like come down to
        self.packed = None
        return super()._apply(*arguments, **more)

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"packed": None, "budget": None}


class Budget:
    """How many bytes the packed experts of a model may take; beyond, those that were not used for longest are given up.

    A forward that is under way keeps what it computes with, whatever is given up meanwhile.
    """

    def __init__(self, most: int):
        self.most, self.total = most, 0
        self.sizes: dict[IntegerLinear, int] = {}  # the one that was used last stands last
        self.lock = threading.Lock()  # a model may be used from several threads

    def use(self, linear: IntegerLinear, packed: Packed) -> None:
        with self.lock:
            size = self.sizes.pop(linear, None)
            if size is None:
                size = sum(part.nbytes for part in (*packed, *(packed.kernel or ())) if isinstance(part, Tensor))
                self.total += size
            self.sizes[linear] = size
            while self.total > self.most and len(self.sizes) > 1:
                oldest = next(iter(self.sizes))
                oldest.packed = None
                self.total -= self.sizes.pop(oldest)
