"""The layers stacked: token ids -> logits, and a draft layer that predicts one token more.

    token_ids (B, T) ─ embed_tokens ─ x (B, T, D) ─┬─ layers.0 … layers.L-1 ─ norm ─ h ─ lm_head ─ logits (B, T, V)
                                                   │
                       x = x + attention(norm(x)) ─┤  each layer
                       x = x + mlp(norm(x))       ─┘   the mlp is a mixture of experts except in the first layers

    Multi-token prediction (MTP): one layer more, layers.L, guesses a second token, so that generation can take two in
    one step (speculative.py). It looks at h at t and at the token that came at t+1, and predicts the one at t+2:

        embedding of t+1 ─ enorm ─┐
                                  ├─ eh_proj ─ a layer ─ shared_head.norm ─ lm_head ─ logits
                  h at t ─ hnorm ─┘

Modules are named as the checkpoint's tensors: `model.layers.0.self_attn.q_a_proj.weight` is exactly that
attribute here. Papers: DeepSeek-V3 (arXiv:2412.19437; section 2.2, eq. 21-23 for MTP); the norm before each part and
not after it is Xiong et al. 2020 (arXiv:2002.04745).
"""

import torch
from torch import Tensor, nn

from .config import Config
from .layers import MLP, KVCache, Linear, RMSNorm, RotaryEmbedding, attention_mask, new_weight
from .mla import Attention
from .moe import DeepSeekMoE


class Layer(nn.Module):
    """One layer: two steps, each added to the residual stream x. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        # The norm of the MLP. Its name in the files says where it stands: after attention.
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.is_sparse(layer_idx)
        self.mlp = DeepSeekMoE(config) if sparse else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class MTPLayer(Layer):
    """The draft layer (MTP module), after the last. It uses the main model's embedding and head; files hold copies."""

    def __init__(self, config: Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn.layer_idx = 0  # it has a cache of its own
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def join(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Both (B, T, D) -> (B, T, D). The released weights want the embedding first, eq. 21 of the paper last."""
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1))


class Transformer(nn.Module):
    """Everything but the head; the tensors under `model.`"""

    def __init__(self, config: Config):
        super().__init__()
        size = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(*size, _weight=new_weight(*size))
        self.layers = nn.ModuleList(Layer(config, layer_idx) for layer_idx in range(config.num_hidden_layers))
        for extra in range(config.num_nextn_predict_layers):
            self.layers.append(MTPLayer(config, config.num_hidden_layers + extra))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(self, token_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) -> the final, normed hidden states (B, T, D). With a cache the tokens follow those in it."""
        layers = [layer for layer in self.layers if not isinstance(layer, MTPLayer)]
        x = self.norm(self.run(layers, self.embed_tokens(token_ids), cache))
        if torch.is_grad_enabled() and len(layers) < len(self.layers):
            x = x + self.zero_from_the_draft_layer(token_ids, x)
        return x

    def zero_from_the_draft_layer(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """0, with zero gradients for the draft layer: DDP waits for one of every weight. (B, T), (B, T, D) -> ()."""
        return self.predict_second(token_ids[:1, :1], hidden[:1, :1])[:, :0].sum()

    def predict_second(self, token_ids: Tensor, hidden: Tensor, cache: KVCache | None = None) -> Tensor:
        """The draft layer's part of `Model.mtp`: tokens t+1 (B, T) and final states t (B, T, D) -> states for t+2."""
        layer = self.layers[-1]
        x = self.run([layer], layer.join(self.embed_tokens(token_ids), hidden), cache)
        return layer.shared_head["norm"](x)

    def run(self, layers: list[Layer], x: Tensor, cache: KVCache | None) -> Tensor:
        """(B, T, D) through layers, (B, T, D); positions and mask follow from what the cache holds."""
        T, device = x.shape[1], x.device
        first, padding = (cache.length, cache.padding) if cache is not None else (0, None)
        positions = torch.arange(first, first + T, device=device)[None]  # (1, T)
        if padding is not None:
            positions = (positions - padding).clamp(min=0)  # (B, T)
        mask = attention_mask(first, T, padding, device)

        cos, sin = self.rotary_emb(positions, x.dtype)
        for layer in layers:
            x = layer(x, cos, sin, mask, cache)
        if cache is not None:
            cache.length += T
        return x


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
        V values each (0.26 MB a token for DeepSeek-V3), to be thrown away.
        """
        x = self.model(token_ids, cache)  # (B, T, D)
        return self.lm_head(x[:, -1:] if last_only else x)

    def mtp(self, token_ids: Tensor, hidden: Tensor, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """A second token ahead: `token_ids` (B, T) are the tokens at positions 1…T, `hidden` (B, T, D) the main
        model's states at 0…T-1 after its final norm -> logits (B, T, V) for positions 2…T+1.

        Raises ValueError for a checkpoint without the layer.
        """
        if not self.config.num_nextn_predict_layers:
            raise ValueError("this checkpoint has no layer for multi-token prediction")
        x = self.model.predict_second(token_ids, hidden, cache)
        return self.lm_head(x[:, -1:] if last_only else x)
