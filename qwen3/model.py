"""The layers stacked: token ids -> logits.

    token_ids (B, T) ─ embed_tokens ─ x (B, T, D) ─┬─ layers.0 … layers.L-1 ─ norm ─ lm_head ─ logits (B, T, V)
                                                   │
                       x = x + attention(norm(x)) ─┤  each layer
                       x = x + mlp(norm(x))       ─┘

Modules are named as the checkpoint's tensors: `model.layers.0.self_attn.q_proj.weight` is exactly that attribute here.

Papers: Qwen3 (arXiv:2505.09388, section 2); the norm before each part and not after it is Xiong et al. 2020
(arXiv:2002.04745).
"""

import torch
from torch import Tensor, nn

from .config import Config
from .layers import MLP, Attention, KVCache, Linear, RMSNorm, RotaryEmbedding, attention_mask, new_weight


class Layer(nn.Module):
    """One layer: two steps, each added to the residual stream x. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        # The norm of the MLP. Its name in the files says where it stands: after attention.
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Transformer(nn.Module):
    """Everything but the head; the tensors under `model.`"""

    def __init__(self, config: Config):
        super().__init__()
        size = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(*size, _weight=new_weight(*size))
        self.layers = nn.ModuleList(Layer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) -> the final, normed hidden states (B, T, D). With a cache the tokens follow those in it."""
        T, device = token_ids.shape[1], token_ids.device
        first, padding = (cache.length, cache.padding) if cache is not None else (0, None)
        positions = torch.arange(first, first + T, device=device)[None]  # (1, T)
        if padding is not None:
            positions = (positions - padding).clamp(min=0)  # (B, T)
        mask = attention_mask(first, T, padding, device)

        x = self.embed_tokens(token_ids)  # (B, T, D)
        cos, sin = self.rotary_emb(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)


class Model(nn.Module):
    """model(token_ids) -> logits; (B, T) int64 -> (B, T, V)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Where the config says so, embedding and head are one matrix, read by rows going in, by columns coming out."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, token_ids: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Causal. Without a cache differentiable and stateless; `last_only` gives (B, 1, V).

        Generating asks for the last position only. All the others of a prompt would cost 2 * V * D operations and
        V values each (0.3 MB a token for Qwen3), to be thrown away.
        """
        x = self.model(token_ids, cache)  # (B, T, D)
        return self.lm_head(x[:, -1:] if last_only else x)
