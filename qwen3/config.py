"""The numbers of a checkpoint: config.json and generation_config.json -> Config.

Weights mean nothing without them: how many layers, how wide, how many heads share a key. They are read and never
guessed. Inside this one family rope_theta is 1e6 or 5e6, and head_dim is not hidden_size / num_attention_heads.

The lesson reads the fields that it needs. engine/supported.py opens the files, brings both formats of config.json to
one spelling (the published one), and refuses by name every field that would change the result and is not computed here.

Papers: Qwen3 (arXiv:2505.09388, Tables 1 and 3), YaRN (arXiv:2309.00071).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from .engine.supported import read_supported

@dataclass(frozen=True)
class Config:
    """A checkpoint's numbers, under config.json's own names."""

    vocab_size: int  # rows of the embedding, some more than the tokenizer has tokens
    hidden_size: int  # of the residual stream
    intermediate_size: int  # inside the MLP
    num_hidden_layers: int
    num_attention_heads: int  # of queries
    num_key_value_heads: int  # each is shared by the same number of query heads
    head_dim: int
    max_position_embeddings: int  # the longest context without YaRN
    rms_norm_eps: float
    rope_theta: float  # the base of RoPE's frequencies
    rope_scaling: "Yarn | None" = None  # RoPE stretched to longer contexts
    tie_word_embeddings: bool = False  # the embedding is the output head as well

    # How the weights are stored.
    dtype: torch.dtype | None = None  # None: the file does not say, and the tensors decide
    quantization: str | None = None  # "fp8", "awq", "gptq", …: weights are stored in fewer bits, with scales
    weight_block_size: tuple[int, int] | None = None  # rows x columns that share a scale, where the file says it

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

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "Config":
        """Read config.json, and generation_config.json where there is one.

        Raises FileNotFoundError without a folder or config.json, ValueError naming file and field for what
        this package would compute wrongly.
        """
        fields, storage, generation = read_supported(directory, "qwen3", Yarn)
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=fields.integer("num_hidden_layers"),
            num_attention_heads=fields.integer("num_attention_heads"),
            num_key_value_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim"),
            max_position_embeddings=fields.integer("max_position_embeddings"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=fields.number("rope_theta"),
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
