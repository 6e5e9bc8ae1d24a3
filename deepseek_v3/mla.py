"""3c. Multi-head latent attention (MLA), in two forms that compute the same.

    x (D) ─┬─ kv_a_proj_with_mqa ─┬─ norm ──> c (R)  latent ───┐                          the cache, for every token:
           │                      └─ RoPE ──> k_rope (P) ──────┴─> [c, k_rope]  R + P     576 values in DeepSeek-V3
           │                                                            │
           └─ q_a_proj ─ norm ─ q_b_proj ─┬─> q_nope (H, N)             │
                                          └─ RoPE ──> q_rope (H, P)     │
                                                                        v
    expanded   k_nope, v = kv_b_proj(c), for every head and every token in the cache: (H, N) and (H, M)
               score = (q_nope·k_nope + q_rope·k_rope) · scale,  out = Σ softmax(score) v

    absorbed   kv_b_proj is W_UK and W_UV, and   q_nope·(W_UK c) = (W_UKᵀ q_nope)·c,   Σ a (W_UV c) = W_UV (Σ a c):
               score = ([W_UKᵀ q_nope, q_rope]·[c, k_rope]) · scale,  out = W_UV Σ softmax(score) c
               one key and one value for all heads, and they are what the cache holds: nothing is rebuilt

k_rope is one head for all query heads, and apart from the latent: a rotation between W_UK and c, different for
every token, could not be folded into the query.

Papers: DeepSeek-V2 (arXiv:2405.04434, section 2.1.2, eq. 9-13; 2.1.3, eq. 14-19), DeepSeek-V3 (arXiv:2412.19437,
eq. 1-11).
"""

import torch
from torch import Tensor, nn

from .attention import attend
from .config import Config
from .layers import KVCache, Linear, RMSNorm, mscale, neighbours_apart, product, rotate

LATENT_EPS = 1e-6  # of the norms on latents, whatever rms_norm_eps says: Moonlight's is 1e-5, and its weights want this


def softmax_scale(config: Config) -> float:
    """1 / sqrt(N + P); with YaRN times mscale², which DeepSeek puts here and not on cos and sin (arXiv:2309.00071, eq. 22)."""
    scale, yarn = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5, config.rope_scaling
    return scale * mscale(yarn, yarn.mscale_all_dim) ** 2 if yarn and yarn.mscale_all_dim else scale


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D). `absorb` None takes the form that needs fewer operations; True and False are for tests."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        D, H, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        self.N, self.P, self.M, self.R = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, R
        self.layer, self.scale, self.interleaved, self.absorb = layer, softmax_scale(config), config.rope_interleave, None
        self.q_lora_rank = config.q_lora_rank
        if self.q_lora_rank is None:
            self.q_proj = Linear(D, H * (self.N + self.P))
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, H * (self.N + self.P))
        self.kv_a_proj_with_mqa = Linear(D, R + self.P)
        self.kv_a_layernorm = RMSNorm(R, LATENT_EPS)
        self.kv_b_proj = Linear(R, H * (self.N + self.M))
        self.o_proj = Linear(H * self.M, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.view(B, T, -1, self.N + self.P).transpose(1, 2).split((self.N, self.P), -1)  # (B, H, T, N), (…, P)
        c, k_rope = self.kv_a_proj_with_mqa(x).split((self.R, self.P), -1)  # (B, T, R), (B, T, P)
        if self.interleaved:
            q_rope, k_rope = neighbours_apart(q_rope), neighbours_apart(k_rope)
        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope[:, None], cos, sin)[:, 0]
        latents = torch.cat((self.kv_a_layernorm(c), k_rope), -1)  # (B, T, R + P)
        if cache is not None:
            latents = cache.write(self.layer, latents)  # (B, S, R + P)
        form = self.absorbed if self.absorbs(T, latents.shape[1]) else self.expanded
        out = form(q_nope, q_rope, latents, mask)  # (B, H, T, M)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)

    def absorbs(self, T: int, S: int) -> bool:
        """Whether the absorbed form takes fewer multiplications. For each head

        expanded   S R (N + M) to rebuild keys and values     T S (N + P) for scores, T S M for their sums
        absorbed   T R (N + M) to fold into query and output  T S (R + P)             T S R
        """
        fewer = (S - T) * self.R * (self.N + self.M) > T * S * (2 * self.R - self.N - self.M)
        return fewer if self.absorb is None else self.absorb

    def expanded(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """The definition: every head has keys and values of its own, made of the latents. -> (B, H, T, M)"""
        B, S, _ = latents.shape
        c, k_rope = latents.split((self.R, self.P), -1)
        k_nope, v = self.kv_b_proj(c).view(B, S, -1, self.N + self.M).transpose(1, 2).split((self.N, self.M), -1)
        q = torch.cat((q_nope, q_rope), -1)  # (B, H, T, N + P)
        k = torch.cat((k_nope, k_rope[:, None].expand(-1, q.shape[1], -1, -1)), -1)  # (B, H, S, N + P)
        return attend(q, k, v, mask, self.scale)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """The same on the latents alone: one key [c, k_rope] and one value c for all heads. -> (B, H, T, M)"""
        W = self.kv_b_proj.matrix(latents.dtype).view(-1, self.N + self.M, self.R)  # (H, N + M, R)
        W_UK, W_UV = W.split((self.N, self.M), 1)
        q = torch.cat((each_head(q_nope, W_UK.mT), q_rope), -1)  # (B, H, T, R + P)
        return each_head(attention_on_latents(q, latents, self.R, mask, self.scale), W_UV)


def each_head(x: Tensor, W: Tensor) -> Tensor:
    """x W^T with a matrix for each head: (B, H, T, in) and (H, out, in) -> (B, H, T, out)."""
    rows = x.transpose(0, 1).flatten(1, 2).contiguous()  # (H, B*T, in)
    # `product` is fast on matrices that lie row by row; W_UK^T lies column by column, and would be slower by a factor.
    y = product(rows, W) if W.stride(-1) == 1 else rows @ W.mT
    return y.unflatten(1, (len(x), -1)).transpose(0, 1)


def attention_on_latents(q: Tensor, latents: Tensor, R: int, mask: Tensor | None, scale: float) -> Tensor:
    """attention_written_out(q, k, v, mask, scale) with the k latents (B, S, R + P) and the v latents[:, :, :R] of all heads.

    q (B, H, T, R + P) -> (B, H, T, R). For one sequence the queries of all heads are rows of two plain products, which
    read the cache where it lies; a batch would go sequence by sequence, and is left to the fused kernel.
    """
    B, H, T, _ = q.shape
    if B > 1:
        return attend(q, latents[:, None], latents[:, None, :, :R], mask, scale)
    scores = product(q[0].flatten(0, 1), latents[0]).view(H, T, -1) * scale
    if mask is not None:
        scores = scores.masked_fill(~(mask if mask.ndim == 2 else mask[0]), -torch.inf)
    weights = scores.float().softmax(-1).to(q.dtype).flatten(0, 1)  # (H T, S)
    return product(weights, latents[0, :, :R].mT).view(1, H, T, R)
