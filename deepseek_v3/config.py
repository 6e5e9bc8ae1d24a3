"""1. The numbers of a checkpoint: config.json and generation_config.json -> Config.

New against Qwen3-MoE: the ranks of compressed keys, values and queries, heads of two parts, groups of experts, experts
that every token uses, and a layer that predicts a second token. The architecture is that of DeepSeek-V3, V3.1, R1 (671B),
Moonlight (16B) and Kimi-K2 (1T); what changes the result is read here and used, or refused by name.

`config.json` comes in two formats: the published one with `rope_theta`, `rope_scaling` and `torch_dtype`, and that of
transformers 5 with `rope_parameters` (both of the former in one) and `dtype`.

Papers: DeepSeek-V3 (arXiv:2412.19437, section 4.2), YaRN (arXiv:2309.00071).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .engine.fields import DTYPES, Fields, read_json, short
from .engine.supported import check_every, read_supported

__all__ = ["DTYPES", "Config", "Yarn", "read_json"]

# What GLM-4.7-Flash means where its file does not say it: the values of its class in transformers.
GLM_DEFAULTS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "rms_norm_eps": 1e-5}


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
    intermediate_size: int  # the width of the MLP in the first, dense layers
    moe_intermediate_size: int  # the width of one expert
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None  # values a query is compressed to; None: it is not
    kv_lora_rank: int  # values that keys and values of all heads are compressed to
    qk_nope_head_dim: int  # the part of a query or key head that knows no position,
    qk_rope_head_dim: int  # the part that is rotated by it,
    v_head_dim: int  # and the size of a value head
    n_routed_experts: int
    n_shared_experts: int  # these see every token
    num_experts_per_tok: int
    n_group: int  # experts come in so many groups,
    topk_group: int  # and a token chooses from the best of those
    norm_topk_prob: bool  # the weights of the chosen experts are made to add up to 1,
    routed_scaling_factor: float  # and are then multiplied by this
    first_k_dense_replace: int  # the first layers have no experts
    num_nextn_predict_layers: int  # layers after the last that predict the token after the next; 1 can be used
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_interleave: bool = True  # rotated pairs are neighbours
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
    no_drafts: str = ""  # why the layer that predicts a second token cannot be used, where the files have one
    notes: tuple[str, ...] = ()  # what is passed over or done otherwise, for standard error

    @property
    def context_length(self) -> int:
        """Tokens, prompt and answer together. YaRN stretches what the model was trained on."""
        if self.rope_scaling is None:
            return self.max_position_embeddings
        stretched = self.rope_scaling.factor * self.rope_scaling.original_max_position_embeddings
        return max(self.max_position_embeddings, int(stretched))

    @property
    def head_dim(self) -> int:
        """What RoPE turns, as transformers has it."""
        return self.qk_rope_head_dim

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has experts instead of one MLP."""
        return layer >= self.first_k_dense_replace

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "Config":
        """Read config.json, and generation_config.json where there is one.

        Raises FileNotFoundError without a folder or config.json, ValueError naming file and field for what
        this package would compute wrongly.
        """
        fields, generation, quantization = read_supported(directory, "deepseek_v3")
        check_attention(fields)
        rope_theta, yarn = read_rope(fields)
        vocab_size = fields.integer("vocab_size")
        stop_ids = generation.token_ids("eos_token_id", vocab_size)
        if stop_ids is None:
            stop_ids = fields.token_ids("eos_token_id", vocab_size)

        config = cls(
            **{name: fields.integer(name) for name in (
                "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings")},
            q_lora_rank=None if fields.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
            n_routed_experts=fields.integer("n_routed_experts", fields.get("num_local_experts")),
            norm_topk_prob=fields.boolean("norm_topk_prob"),
            routed_scaling_factor=fields.number("routed_scaling_factor"),
            first_k_dense_replace=read_dense_layers(fields),
            num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", fields.get("num_mtp_layers", 0), zero=True),
            rope_interleave=fields.boolean("rope_interleave", True),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=rope_theta, rope_scaling=yarn,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            dtype=fields.dtype(),
            eos_token_id=stop_ids or (),
            **quantization,
            **read_sampling(generation),
            notes=tuple(fields.notes + generation.notes),
        )
        refuse_impossible_numbers(fields, config)
        return config


def check_attention(fields: Fields) -> None:
    """ValueError for what this package's attention and experts would compute wrongly."""
    if fields.get("model_type") == "glm4_moe_lite":
        fields.values = GLM_DEFAULTS | {name: value for name, value in fields.values.items() if value is not None}
    for name, known in (("hidden_act", "silu"), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc"), ("attention_bias", False),
                        ("head_dim", fields.get("qk_rope_head_dim")), ("num_key_value_heads", fields.get("num_attention_heads")),
                        ("num_local_experts", fields.get("n_routed_experts", fields.get("num_local_experts")))):
        if fields.get(name, known) != known:
            fields.refuse(name, f"only {json.dumps(known)[:60]} is known here")
    if fields.get("sliding_window") is not None and fields.boolean("use_sliding_window", True):
        fields.refuse("sliding_window", "sliding-window attention is not supported")
    layers = fields.integer("num_hidden_layers")
    if fields.get("layer_types") is not None:
        check_every(fields, "layer_types", layers, "full_attention", "only 'full_attention' is known")


def read_dense_layers(fields: Fields) -> int:
    """How many layers at the beginning have no experts, in any of three spellings."""
    layers, dense = fields.integer("num_hidden_layers"), fields.get("first_k_dense_replace")
    for name, sparse in (("mlp_layer_types", "sparse"), ("moe_layer_freq", 1)):
        given = fields.get(name)
        if isinstance(given, list):
            first = next((layer for layer, kind in enumerate(given) if kind == sparse), len(given))
            dense = first if dense is None else dense
            check_every(Fields(fields.path, {name: given[first:]}), name, layers - first, sparse, f"only {sparse!r} is known after the dense layers")
            if dense != first:
                fields.refuse(name, f"first_k_dense_replace says that {short(dense)} layers are dense, this list {first}")
        elif given is not None and (name, given) != ("moe_layer_freq", 1):
            fields.refuse(name, f"only {json.dumps(sparse)} is known here")
    return fields.integer("first_k_dense_replace", 1 if dense is None and fields.get("model_type") == "glm4_moe_lite" else dense, zero=True)


def refuse_impossible_numbers(fields: Fields, config: Config) -> None:
    E, groups, left = config.n_routed_experts, config.n_group, config.n_routed_experts // config.n_group * config.topk_group
    if config.qk_rope_head_dim % 2:
        fields.refuse("qk_rope_head_dim", "expected an even number, for RoPE turns pairs")
    if E % groups or (groups > 1 and E < 2 * groups):
        fields.refuse("n_group", f"the {E} experts do not make groups of one size with two experts or more")
    if config.topk_group > groups:
        fields.refuse("topk_group", f"there are only {groups} groups")
    if config.num_experts_per_tok > left:
        fields.refuse("num_experts_per_tok", f"only {left} experts are left to choose from")


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
