"""Multi-head latent attention (MLA), in two forms that compute the same.

    x (D) ─┬─ kv_a_proj_with_mqa ─┬─ norm ──> c (R)  latent ───┐                          the cache, for every token:
           │                      └─ RoPE ──> k_rope (P) ──────┴─> [c, k_rope]  R + P     576 values in DeepSeek-V3
           │                                                            │
           └─ q_a_proj ─ norm ─ q_b_proj ─┬─> q_nope (H, N)             │
                                          └─ RoPE ──> q_rope (H, P)     │
                                                                        ▼
    expanded   k_nope, v = kv_b_proj(c), for every head and every token in the cache: (H, N) and (H, M)
               score = (q_nope·k_nope + q_rope·k_rope) · scale,  out = Σ softmax(score) v

    absorbed   kv_b_proj is W_UK and W_UV, and with a = softmax(score)
               q_nope·(W_UK c) = (W_UKᵀ q_nope)·c,   Σ a (W_UV c) = W_UV (Σ a c):
               score = ([W_UKᵀ q_nope, q_rope]·[c, k_rope]) · scale,  out = W_UV Σ softmax(score) c
               one key and one value for all heads, and they are what the cache holds: nothing is rebuilt

k_rope is one head for all query heads, and apart from the latent: a rotation between W_UK and c, different for
every token, could not be folded into the query. In the code `latents` are c and k_rope together, as the cache has them.

Papers: DeepSeek-V2 (arXiv:2405.04434, section 2.1.2, eq. 9-13; 2.1.3, eq. 14-19), DeepSeek-V3 (arXiv:2412.19437,
eq. 1-11).
"""

import torch
from torch import Tensor, nn

from .config import Config
from .layers import KVCache, Linear, RMSNorm, deinterleave, rotate
from .yarn import mscale

LATENT_EPS = 1e-6  # of the norms on latents, whatever rms_norm_eps says: Moonlight's is 1e-5, and its weights want this


def softmax_scale(config: Config) -> float:
    """1 / sqrt(N + P); with YaRN times mscale² (arXiv:2309.00071, eq. 22).

    DeepSeek wants that factor here, where it reaches both parts of a head, and not on cos and sin: its configs say
    mscale = mscale_all_dim, and what yarn.py puts on cos and sin is the quotient of the two, 1.
    """
    scale, scaling = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5, config.rope_scaling
    if scaling and scaling.mscale_all_dim:
        scale *= mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


class Attention(nn.Module):
    """(B, T, D) -> (B, T, D), in the form that takes fewer operations."""

    def __init__(self, config: Config, layer_idx: int):
        super().__init__()
        D, H, R = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        N, P, M = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.layer_idx, self.scale = layer_idx, softmax_scale(config)
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim, self.kv_lora_rank = N, P, M, R
        self.q_lora_rank, self.rope_interleave = config.q_lora_rank, config.rope_interleave
        self.cached = [(1, R + P)]  # heads and size of what the cache keeps of each token: one latent for all heads
        if self.q_lora_rank is None:
            self.q_proj = Linear(D, H * (N + P))
        else:
            self.q_a_proj = Linear(D, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, H * (N + P))
        self.kv_a_proj_with_mqa = Linear(D, R + P)
        self.kv_a_layernorm = RMSNorm(R, LATENT_EPS)
        self.kv_b_proj = Linear(R, H * (N + M))
        self.o_proj = Linear(H * M, D)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        N, P, R = self.qk_nope_head_dim, self.qk_rope_head_dim, self.kv_lora_rank
        q = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (-1, N + P)).transpose(1, 2).split((N, P), -1)  # (B, H, T, N), (B, H, T, P)
        c, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split((R, P), -1)  # (B, 1, T, R), (B, 1, T, P)
        if self.rope_interleave:
            q_rope, k_rope = deinterleave(q_rope), deinterleave(k_rope)
        q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)
        latents = torch.cat((self.kv_a_layernorm(c), k_rope), -1)  # (B, 1, T, R + P)
        if cache is not None:
            (latents,) = cache.write(self.layer_idx, latents)  # (B, 1, S, R + P)
        form = self.absorbed if self.absorbs(x.shape[1], latents.shape[2]) else self.expanded
        out = form(q_nope, q_rope, latents, mask)  # (B, H, T, M)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)

    def absorbs(self, T: int, S: int) -> bool:
        """Whether the absorbed form takes fewer multiplications. For each head

        expanded   S R (N + M) to rebuild keys and values     T S (N + P) for scores, T S M for their sums
        absorbed   T R (N + M) to fold into query and output  T S (R + P)             T S R
        """
        N, M, R = self.qk_nope_head_dim, self.v_head_dim, self.kv_lora_rank
        return (S - T) * R * (N + M) > T * S * (2 * R - N - M)  # the difference of the two; P is in both

    def expanded(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        """Every head has keys and values of its own, expanded from the latents: (B, H, T, ·) -> (B, H, T, M)."""
        N, M = self.qk_nope_head_dim, self.v_head_dim
        c, k_rope = latents.split((self.kv_lora_rank, self.qk_rope_head_dim), -1)  # (B, 1, S, R), (B, 1, S, P)
        kv = self.kv_b_proj(c[:, 0]).unflatten(-1, (-1, N + M)).transpose(1, 2)  # (B, H, S, N + M)
        k_nope, v = kv.split((N, M), -1)
        k = torch.cat((k_nope, k_rope.expand(-1, kv.shape[1], -1, -1)), -1)  # (B, H, S, N + P)
        return self.sdpa(torch.cat((q_nope, q_rope), -1), k, v, mask)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        """On the latents alone: one key [c, k_rope] and one value c for all heads. (B, H, T, ·) -> (B, H, T, M)."""
        N, M, R = self.qk_nope_head_dim, self.v_head_dim, self.kv_lora_rank
        W_UK, W_UV = self.kv_b_proj.matrix(latents.dtype).view(-1, N + M, R).split((N, M), 1)  # (H, N, R), (H, M, R)
        q = torch.cat((self.each_head(q_nope, W_UK.mT), q_rope), -1)  # W_UKᵀ q_nope: (B, H, T, R), and q_rope
        out = self.sdpa(q, latents, latents[..., :R], mask)  # (B, H, T, R)
        return self.each_head(out, W_UV)

    def each_head(self, x: Tensor, W: Tensor) -> Tensor:
        """x W^T with a matrix for each head: (B, H, T, in) and (H, out, in) -> (B, H, T, out)."""
        return torch.einsum("bhti,hoi->bhto", x, W)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """softmax(q k^T * scale) v, with keys and values for each head (K = H) or one for all (K = 1).

        q (B, H, T, ·), k (B, K, S, ·), v (B, K, S, M or R) -> (B, H, T, M or R).
        """
        q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, T, ·)
        scores = torch.einsum("bkgtn,bksn->bkgts", q, k) * self.scale
        scores = scores.masked_fill(~mask[..., None, :, :], -torch.inf)
        weights = scores.float().softmax(-1).to(q.dtype)
        return torch.einsum("bkgts,bksm->bkgtm", weights, v).flatten(1, 2)
