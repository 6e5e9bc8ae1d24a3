"""The numbers of a checkpoint: config.json and generation_config.json -> Config.

New against Qwen3-MoE: the ranks that keys, values and queries are compressed to, heads of two parts, groups of experts,
experts that every token uses, and a layer that predicts a second token. DeepSeek-V3, V3.1, R1 (671B), Moonlight (16B)
and Kimi-K2 (1T) have this architecture and differ in these numbers, so they are read and never guessed.

The lesson reads the fields that it needs. engine/supported.py opens the files, brings both formats of config.json to
one spelling (the published one), and refuses by name every field that would change the result and is not computed here.

Papers: DeepSeek-V3 (arXiv:2412.19437, section 4.2), YaRN (arXiv:2309.00071).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from .engine.supported import read_supported

@dataclass(frozen=True)
class Config:
    """A checkpoint's numbers, under config.json's own names."""

    vocab_size: int
    hidden_size: int  # of the residual stream
    intermediate_size: int  # inside the MLP of the first, dense layers
    moe_intermediate_size: int  # inside one expert
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None  # values that a query is compressed to; None: it is not
    kv_lora_rank: int  # values that keys and values of all heads are compressed to
    qk_nope_head_dim: int  # head size of queries and keys without RoPE,
    qk_rope_head_dim: int  # the part that RoPE rotates,
    v_head_dim: int  # and the head size of values
    n_routed_experts: int
    n_shared_experts: int  # these see every token
    num_experts_per_tok: int  # how many of the routed experts a token uses
    n_group: int  # experts come in so many groups,
    topk_group: int  # and a token chooses from the best of those
    norm_topk_prob: bool  # the weights of the chosen experts are made to add up to 1,
    routed_scaling_factor: float  # and are then multiplied by this
    first_k_dense_replace: int  # the first layers have no experts
    num_nextn_predict_layers: int  # layers after the last that predict the token after the next; 1 can be used
    max_position_embeddings: int  # the longest context, or the one that YaRN makes of a shorter one
    rms_norm_eps: float
    rope_theta: float  # the base of RoPE's frequencies
    rope_interleave: bool = True  # rotated pairs are neighbours
    rope_scaling: "Yarn | None" = None  # RoPE stretched to longer contexts
    tie_word_embeddings: bool = False  # the embedding is the output head as well

    # How the weights are stored.
    dtype: torch.dtype | None = None  # None: the file does not say, and the tensors decide
    quantization: str | None = None  # "fp8", "awq", "gptq", …: weights are stored in fewer bits, with scales
    weight_block_size: tuple[int, int] | None = None  # rows x columns that share a scale, where the file says it
    no_drafts: str = ""  # why the draft layer cannot be used, where the files have one

    # How to generate, from generation_config.json.
    eos_token_id: tuple[int, ...] = ()  # all that end an answer
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    notes: tuple[str, ...] = ()  # what is passed over or done otherwise, for standard error

    @property
    def context_length(self) -> int:
        """Tokens, prompt and answer together. YaRN stretches what the model was trained on."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        stretched = self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings
        return max(self.max_position_embeddings, int(stretched))

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has experts instead of one MLP."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "Config":
        """Read config.json, and generation_config.json where there is one.

        Raises FileNotFoundError without a folder or config.json, ValueError naming file and field for what
        this package would compute wrongly.
        """
        fields, storage, generation = read_supported(directory, "deepseek_v3", Yarn)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            moe_intermediate_size=fields.integer("moe_intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers"),
            num_attention_heads=fields.integer("num_attention_heads"),
            q_lora_rank=None if fields.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
            kv_lora_rank=fields.integer("kv_lora_rank"),
            qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
            qk_rope_head_dim=fields.integer("qk_rope_head_dim"),
            v_head_dim=fields.integer("v_head_dim"),
            n_routed_experts=fields.integer("n_routed_experts"),
            n_shared_experts=fields.integer("n_shared_experts"),
            num_experts_per_tok=fields.integer("num_experts_per_tok"),
            n_group=fields.integer("n_group"),
            topk_group=fields.integer("topk_group"),
            norm_topk_prob=fields.boolean("norm_topk_prob"),
            routed_scaling_factor=fields.number("routed_scaling_factor"),
            first_k_dense_replace=fields.integer("first_k_dense_replace", zero=True),
            num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", 0, zero=True),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=fields.number("rope_theta"),
            rope_interleave=fields.boolean("rope_interleave", True),
            rope_scaling=fields.get("rope_scaling"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            **storage,
            **generation,
            notes=tuple(fields.notes),
        )


@dataclass(frozen=True)
class Yarn:
    """YaRN's numbers, spelled as in `rope_scaling` (arXiv:2309.00071)."""

    factor: float  # how many times longer the context becomes
    original_max_position_embeddings: int  # the context that the model was trained on
    beta_fast: float = 32.0  # pairs that turn more often than this in that context keep their frequency,
    beta_slow: float = 1.0  # those that turn less often are slowed down by the factor, in between it is blended
    truncate: bool = True  # the limits of the blend are rounded to whole pairs
    attention_factor: float | None = None  # on cos and sin; None: computed from the factor and the two mscales
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attn_factor: float = 1.0  # multiplies the factor that is computed
