"""1. The numbers of a checkpoint: config.json and generation_config.json -> Config.

Everything that changes the result is read here and used, or refused by name. Nothing is guessed from a
size or a file name: inside this one family rope_theta is 1e6, 5e6 or 1e7, and head_dim is not
hidden_size / num_attention_heads.

`config.json` comes in two formats. The published ones say `rope_theta`, `rope_scaling`, `torch_dtype`;
those that transformers 5 writes say `rope_parameters` (both of the former in one) and `dtype`.

Papers: Qwen3 (arXiv:2505.09388, Tables 1 and 3), YaRN (arXiv:2309.00071).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from .engine.fields import DTYPES, Fields, read_json, short
from .engine.supported import check_every, read_supported

__all__ = ["DTYPES", "Config", "Yarn", "read_json"]


@dataclass(frozen=True)
class Yarn:
    """YaRN's numbers, spelled as in `rope_scaling` (arXiv:2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attn_factor: float = 1.0  # multiplies whatever the factor on cos and sin is


@dataclass(frozen=True)
class Config:
    """A checkpoint's numbers, under config.json's own names; the sampling defaults are generation_config.json's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Yarn | None = None
    tie_word_embeddings: bool = False
    dtype: torch.dtype | None = None  # None: the file does not say, and the tensors decide
    quantization: str | None = None  # "fp8": weights are stored in eight bits, with scales
    weight_block_size: tuple[int, int] | None = None  # rows x columns that share a scale, where the file says it
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
        fields, generation, quantization = read_supported(directory, "qwen3")
        check_attention(fields)
        rope_theta, yarn = read_rope(fields)
        vocab_size = fields.integer("vocab_size")
        stop_ids = generation.token_ids("eos_token_id", vocab_size)
        if stop_ids is None:
            stop_ids = fields.token_ids("eos_token_id", vocab_size)

        heads = fields.get("num_attention_heads") if "num_key_value_heads" in fields.values else None  # null: as many
        config = cls(
            **{name: fields.integer(name) for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "head_dim", "max_position_embeddings")},
            num_key_value_heads=fields.integer("num_key_value_heads", heads),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=yarn,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            dtype=fields.dtype(),
            eos_token_id=stop_ids or (),
            **quantization,
            **read_sampling(generation),
            notes=tuple(fields.notes + generation.notes),
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(f"{fields.path}: num_attention_heads {config.num_attention_heads} is not a multiple "
                             f"of num_key_value_heads {config.num_key_value_heads}")
        if config.head_dim % 2:
            raise ValueError(f"{fields.path}: head_dim {config.head_dim} is odd, and RoPE turns pairs")
        return config


def check_attention(fields: Fields) -> None:
    """ValueError for what this package's attention would compute wrongly."""
    if fields.get("hidden_act", "silu") != "silu":
        fields.refuse("hidden_act", "only 'silu' is known")
    if fields.boolean("attention_bias", False):
        fields.refuse("attention_bias", "only false is known")
    # The published files carry a window that is switched off; transformers 5 spells the outcome per layer. A size that
    # is left out is some default and not "no window", which is null.
    layers = fields.integer("num_hidden_layers")
    if fields.get("layer_types") is not None:
        check_every(fields, "layer_types", layers, "full_attention", "only 'full_attention' is known, a sliding window is not")
    elif fields.boolean("use_sliding_window", False) and fields.values.get("sliding_window", "some default") is not None:
        if fields.integer("max_window_layers", 0, zero=True) < layers:
            fields.refuse("use_sliding_window", "sliding-window attention is not supported")


def read_rope(fields: Fields) -> tuple[float, Yarn | None]:
    """(rope_theta, YaRN's numbers or None), from either generation of names; from both where they agree."""
    names = [name for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    given = [read_rope_object(fields, name) for name in names or ["rope_scaling"]]
    if given[0] != given[-1]:
        fields.refuse("rope_scaling", "rope_parameters is there too and says something else; put all of it into that")
    return given[0]


def read_rope_object(fields: Fields, name: str) -> tuple[float, Yarn | None]:
    rope = fields.object(name)
    inside = fields.object("rope_parameters").get("rope_theta", fields.get("rope_theta"))
    theta = rope.number("rope_theta", inside)
    if theta <= 1:
        raise ValueError(f"{fields.path}: rope_theta is {theta}: expected more than 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        fields.refuse(name, f"rope type {short(kind)} is not known, only 'default' and 'yarn' are")
    harmless = {"rope_type", "type", "rope_theta", "finetuned", "max_position_embeddings"}
    for key in sorted(rope.values):
        if key in ("partial_rotary_factor", "extrapolation_factor") and rope.get(key, 1) == 1:
            continue
        if key not in Yarn.__dataclass_fields__ and key not in harmless:
            fields.refuse(name, f"{key!r} is not a field of YaRN that this package knows")
    if fields.get("partial_rotary_factor", 1) != 1:
        fields.refuse("partial_rotary_factor", "only 1.0 is known beside YaRN")
    if rope.get("factor") is None:
        raise ValueError(f"{fields.path}: {name} has type 'yarn' but no factor")
    if rope.get("attn_factor", 1) != 1 and rope.get("attention_factor") is not None:
        fields.refuse(name, "attn_factor and attention_factor are both there; leave out one")
    numbers = {key: rope.number(key, zero=key.startswith("mscale")) for key in Yarn.__dataclass_fields__
               if key != "truncate" and rope.get(key) is not None}
    name = "original_max_position_embeddings"  # outside the object it overrides the one inside, as in transformers 5
    numbers[name] = (rope if fields.get(name) is None else fields).integer(name, fields.integer("max_position_embeddings"))
    return theta, Yarn(**numbers, truncate=rope.boolean("truncate", True))


def read_sampling(generation: Fields) -> dict[str, float]:
    """The defaults of generation_config.json. do_sample false is how a Base checkpoint asks for greedy decoding.

    The penalties count in greedy decoding too. What changes nothing (a penalty of 1.0, a top_k of -1) stays None.
    """
    sampling: dict[str, float] = {}
    if generation.get("repetition_penalty", 1) != 1:
        sampling["repetition_penalty"] = generation.number("repetition_penalty")
    if generation.get("presence_penalty", 0) != 0:
        sampling["presence_penalty"] = generation.signed("presence_penalty", 2)
    if not generation.boolean("do_sample", False):
        return sampling
    sampling["temperature"] = generation.number("temperature", 1.0, zero=True)
    if generation.get("top_k") not in (None, -1):
        sampling["top_k"] = generation.integer("top_k", zero=True)
    for name in ("top_p", "min_p"):
        if generation.get(name) is not None:
            value = generation.number(name, zero=name == "min_p")
            if value > 1:
                generation.refuse(name, "expected at most 1")
            if (name, value) != ("min_p", 0):
                sampling[name] = value
    return sampling
