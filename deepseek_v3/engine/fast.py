"""The parts that are swapped in for speed: the same numbers from the same parameters, by other kernels.

    Linear            FastLinear          bfloat16 matmuls in float32 where the processor is slow at them
    RMSNorm           FastRMSNorm         two operations instead of eight
    Attention         FusedAttention      (parts.py) one token: what is rotated is rotated together, without transposes
    Attention.sdpa    fused_sdpa          PyTorch's fused attention: no (T, S) scores in memory; of one token the form
                                          that is fastest here (one_query.py)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import Linear, RMSNorm
from .one_query import attention_of_one_query

# Without AVX-512, as on many laptops, PyTorch multiplies matrices of 16-bit numbers at a sixth of its float32 speed.
SLOW_IN_16_BITS = torch.backends.cpu.get_cpu_capability() == "AVX2"


class FastLinear(Linear):
    """y = x W^T by `matmul`: (…, in) -> (…, out), with the parameters of Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return matmul(x, self.matrix(x.dtype))


class FastRMSNorm(RMSNorm):
    """RMSNorm by two operations instead of eight, with the parameter of RMSNorm. Shape unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        if not wants_few_operations(x):
            return super().forward(x)
        # Without a weight PyTorch does what the lesson does, and rounds where it does; it would multiply by a weight
        # before it rounds.
        return self.weight * F.rms_norm(x, x.shape[-1:], None, self.eps)


def wants_few_operations(x: Tensor) -> bool:
    """Whether to join operations: while generating on a CPU.

    Training keeps the lesson's own steps and their gradients, and a compiler joins them itself. On a GPU, PyTorch's
    kernels add up in another order, and the bits would differ; so they would in float64, whose norms the lesson
    computes in float32.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and x.itemsize < 8


def matmul(x: Tensor, W: Tensor) -> Tensor:
    """x W^T: (…, T, in) and (…, out, in) -> (…, T, out)."""
    if SLOW_IN_16_BITS or torch.compiler.is_compiling():
        rows = x.shape[:-1].numel() // W.shape[:-2].numel()  # for each matrix
        if rows == 1 and torch.compiler.is_compiling():
            return matmul_one_row(x, W)
        if x.device.type == "cpu" and rows >= 16 and x.itemsize == 2 and SLOW_IN_16_BITS:
            return matmul_in_float32(x, W)
    return F.linear(x, W) if W.ndim == 2 and x.device.type == "cpu" else x @ W.mT  # the same; one operation, not two


def matmul_one_row(x: Tensor, W: Tensor) -> Tensor:
    """For a compiler, one loop over W: a W made from FP8, or selected among experts, is never written to memory."""
    return (x[..., None, :].float() * W.unsqueeze(-3).float()).sum(-1).to(x.dtype)


def matmul_in_float32(x: Tensor, W: Tensor) -> Tensor:
    """In float32, rounded once. Below 16 rows, converting W costs more than it saves."""
    # Piece by piece, since the whole W in float32 (a head's has 150,000 rows) would take twice its own memory.
    x32 = x.float()
    return torch.cat([(x32 @ piece.float().mT).to(x.dtype) for piece in W.split(512, dim=-2)], dim=-1)


def fused_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention.sdpa by PyTorch's kernel: q (B, H, T, N), k (B, K, S, N), v (B, K, S, M) -> (B, H, T, M).

    Keys and values are never repeated for their G queries. A mask of two dimensions is the causal rule alone.
    """
    (B, H, T, N), (K, S), M = q.shape, k.shape[1:3], v.shape[-1]
    v = F.pad(v, (0, N - M)) if M < N else v  # the kernels want values as wide as keys; zeros change nothing
    causal = mask.ndim == 2
    if T == 1:
        out = attention_of_one_query(q, k, v, None if causal else mask, scale)
        return out[..., :M] if M < N else out
    # A whole prompt: the kernel that knows the triangle skips the half that a mask would only hide.
    causal = causal and T == S
    mask = None if causal else mask
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)[..., :M]
