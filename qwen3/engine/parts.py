"""Which part of the lesson is swapped for which, and what else the engine has to know of this architecture.

The other files of the engine know nothing of it.
"""

import torch
from torch import Tensor

from ..config import Config
from ..layers import Attention, Linear
from ..model import Model
from .fast import FastLinear, fused_sdpa
from .safetensors_reader import CheckpointFiles

KEPT_IN_FLOAT32 = ()  # stay float32 whatever the others are, by the last part of their names


class FusedAttention(Attention):
    """Attention whose softmax(q k^T) v is one kernel, with the parameters of Attention."""

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if q.device.type == "mps":  # some versions of PyTorch leak future tokens there, or return NaN
            return super().sdpa(q, k, v, mask)
        return fused_sdpa(q, k, v, mask, self.scale)


FASTER = {Linear: FastLinear, Attention: FusedAttention}  # part of the lesson -> its faster twin, same parameters


def count_parts(config: Config) -> dict[str, int]:
    """What the model is built of, each with a tensor of its own or more: a damaged number shows in too few tensors."""
    return {"layers": config.num_hidden_layers}


def count_experts(config: Config) -> tuple[int, int]:
    """(Experts that a token uses, experts of a layer)."""
    return 1, 1


def correct(config: Config, files: CheckpointFiles) -> Config:
    """The config as far as the files contradict it."""
    return config


def stack_experts(model: Model, files: CheckpointFiles, device: torch.device, dtype: torch.dtype | str | None,
                  compute: torch.dtype) -> None:
    """Put all experts of a layer into few tensors, where that is faster."""


def check_compiled(model: Model) -> None:
    """ValueError for a model whose decode step cannot be compiled; any dense one can be."""
