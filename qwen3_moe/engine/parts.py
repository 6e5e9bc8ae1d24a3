"""Which part of the lesson is swapped for which, and what else the engine has to know of this architecture.

The other files of the engine know nothing of it.
"""

from torch import Tensor

from ..config import Config
from ..layers import Attention, Linear
from ..moe import Experts, Router
from .experts import FastExperts, check_compiled, stack_experts  # noqa: F401 for prepare.py and compiled.py
from .fast import FastLinear, fused_sdpa, matmul
from .safetensors_reader import CheckpointFiles

KEPT_IN_FLOAT32 = ()  # stay float32 whatever the others are, by the last part of their names


class FusedAttention(Attention):
    """Attention whose softmax(q k^T) v is one kernel, with the parameters of Attention."""

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if q.device.type == "mps":  # some versions of PyTorch leak future tokens there, or return NaN
            return super().sdpa(q, k, v, mask)
        return fused_sdpa(q, k, v, mask, self.scale)


class FastRouter(Router):
    def logits(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight)


# Part of the lesson -> its faster twin, with the same parameters.
FASTER = {Linear: FastLinear, Attention: FusedAttention, Router: FastRouter, Experts: FastExperts}


def count_parts(config: Config) -> dict[str, int]:
    """What the model is built of, each with a tensor of its own or more: a damaged number shows in too few tensors."""
    sparse = config.is_sparse(config.num_hidden_layers - 1)
    return {"layers": config.num_hidden_layers, "experts": config.num_experts if sparse else 0}


def count_experts(config: Config) -> tuple[int, int]:
    """(Experts that a token uses, experts of a layer)."""
    return config.num_experts_per_tok, config.num_experts


def correct(config: Config, files: CheckpointFiles) -> Config:
    """The config as far as the files contradict it."""
    return config
