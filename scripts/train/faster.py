"""The same numbers in less time: attention of long rows, and experts whose number of tokens changes at every step."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def fuse_long_rows(model: nn.Module, fused: type[nn.Module], length: int = 512) -> None:
    """Rows of `length` tokens or more go through the engine's attention, which never stores all T² scores."""
    def attention_of(attention: nn.Module) -> Callable[..., Tensor]:
        def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            if q.shape[2] < length:
                return type(attention).sdpa(attention, q, k, v, mask)
            return fused.sdpa(attention, q.float(), k.float(), v.float(), mask)
        return sdpa

    for module in model.modules():
        if issubclass(fused, type(module)) and type(module) is not nn.Module:
            module.sdpa = attention_of(module)


def pad_rows(model: nn.Module, multiple: int = 128) -> None:
    """Give the head, and each expert, rows of zeros up to a multiple: the same numbers, in half of the time.

    They get another number of tokens at every step, and the CPU's library for matmuls (oneDNN) makes new code for every
    new shape, which takes longer than the matmul, and keeps it.
    """
    def pad(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        module.rows = len(x)
        return F.pad(x, (0, 0, 0, -len(x) % multiple)) if x.ndim == 2 else x

    def cut(module: nn.Module, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        return out[:module.rows]

    experts = [mlp for module in model.modules() if type(module).__name__ == "Experts" for mlp in module]
    for module in [model.lm_head, *experts]:
        module.register_forward_pre_hook(pad)
        module.register_forward_hook(cut)
