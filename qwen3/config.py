"""1. The numbers of a checkpoint: config.json and generation_config.json -> Config.

Everything that changes the result is read here and used, or refused by name. Nothing is guessed from a
size or a file name: inside this one family rope_theta is 1e6, 5e6 or 1e7, and head_dim is not
hidden_size / num_attention_heads.

Two generations of files are about. The published ones say `rope_theta`, `rope_scaling`, `torch_dtype`;
those that transformers 5 writes say `rope_parameters` (both of the former in one) and `dtype`.

Papers: Qwen3 (arXiv:2505.09388, Tables 1 and 3), YaRN (arXiv:2309.00071).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# A folder of another family: what it is, and where to go.
OTHER_MODELS = {
    "qwen3_moe": "a Qwen3 mixture of experts; run it with `python -m qwen3_moe.main`",
    "qwen2": "a Qwen2 model (biases on q, k, v and no QK-Norm); this project has no package for it",
    "deepseek_v3": "a model of DeepSeek-V3's architecture; run it with `python -m deepseek_v3.main`",
    "kimi_k2": "a model of DeepSeek-V3's architecture; run it with `python -m deepseek_v3.main`",
}


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
    weight_block_size: tuple[int, int] | None = None  # FP8 checkpoints: rows x columns that share a scale
    eos_token_id: tuple[int, ...] = ()  # all that end an answer
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int | None = None
    top_p: float | None = None

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
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such folder")
        path = directory / "config.json"
        fields = Fields(path, read_json(path))
        refuse_what_is_not_computed(fields)
        rope_theta, yarn = read_rope(fields)

        path = directory / "generation_config.json"
        generation = Fields(path, read_json(path) if path.exists() else {})
        vocab_size = fields.whole("vocab_size")
        stop_ids = read_stop_ids(generation, vocab_size)
        if stop_ids is None:
            stop_ids = read_stop_ids(fields, vocab_size)

        config = cls(
            **{name: fields.whole(name) for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings")},
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=yarn,
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            dtype=read_dtype(fields),
            weight_block_size=read_quantization(fields),
            eos_token_id=stop_ids or (),
            **read_sampling(generation),
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(f"{fields.path}: num_attention_heads {config.num_attention_heads} is not a multiple "
                             f"of num_key_value_heads {config.num_key_value_heads}")
        if config.head_dim % 2:
            raise ValueError(f"{fields.path}: head_dim {config.head_dim} is odd, and RoPE turns pairs")
        return config


class Fields:
    """The fields of one JSON file; its errors name the file and the field."""

    def __init__(self, path: Path, values: dict):
        self.path, self.values = path, values

    def get(self, name: str, default=None):
        value = self.values.get(name)
        return default if value is None else value

    def required(self, name: str, default=None):
        value = self.get(name, default)
        if value is None:
            raise ValueError(f"{self.path}: the field {name} is missing")
        return value

    def number(self, name: str, default: float | None = None, zero: bool = False) -> float:
        value = self.required(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**31 or not (value or zero):
            raise ValueError(f"{self.path}: {name} is {value!r}, expected a positive number")
        return float(value)

    def whole(self, name: str, default: int | None = None, zero: bool = False) -> int:
        value = self.number(name, default, zero)
        if value != int(value):
            raise ValueError(f"{self.path}: {name} is {value!r}, expected a whole number")
        return int(value)

    def object(self, name: str) -> "Fields":
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, "expected an object")
        return Fields(self.path, value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.required(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}: {name} is {value!r}, expected true or false")
        return value

    def refuse(self, name: str, why: str):
        raise ValueError(f"{self.path}: {name} is {self.values.get(name)!r}: {why}")


def read_json(path: Path) -> dict:
    """A JSON object from a file; FileNotFoundError or ValueError naming the file otherwise."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint's folder has one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values


def refuse_what_is_not_computed(fields: Fields) -> None:
    model_type = fields.get("model_type")
    if model_type != "qwen3":
        what = OTHER_MODELS.get(str(model_type))
        fields.refuse("model_type", f"this folder holds {what}" if what else "this package runs only model_type 'qwen3'")
    if fields.get("hidden_act") != "silu":
        fields.refuse("hidden_act", "only 'silu' is known")
    for name, known in (("attention_bias", False), ("qkv_bias", False), ("use_qk_norm", True)):
        if fields.flag(name, known) is not known:
            fields.refuse(name, f"only {str(known).lower()} is known")
    # The published files carry a window that is switched off; transformers 5 spells the outcome per layer. A size that
    # is left out is some default and not "no window", which is null.
    layer_types = fields.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            fields.refuse("layer_types", "only 'full_attention' is known, a sliding window is not")
    elif fields.flag("use_sliding_window", False) and fields.values.get("sliding_window", "some default") is not None:
        if fields.whole("max_window_layers", 0, zero=True) < fields.whole("num_hidden_layers"):
            fields.refuse("use_sliding_window", "sliding-window attention is not supported")


def read_rope(fields: Fields) -> tuple[float, Yarn | None]:
    """(rope_theta, YaRN's numbers or None), from either generation of names."""
    if fields.get("rope_parameters") and fields.get("rope_scaling"):
        fields.refuse("rope_scaling", "rope_parameters is there too; put all of it into that")
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.object(name)
    theta = Fields(fields.path, fields.values | rope.values).number("rope_theta")
    if theta <= 1:
        fields.refuse("rope_theta", "expected more than 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        fields.refuse(name, f"rope type {kind!r} is not known, only 'default' and 'yarn' are")
    known = set(Yarn.__dataclass_fields__) | {"rope_type", "type", "rope_theta"}
    if unknown := sorted(set(rope.values) - known):
        fields.refuse(name, f"{unknown[0]!r} is not a field of YaRN that this package knows")
    if rope.get("factor") is None:
        raise ValueError(f"{fields.path}: {name} has type 'yarn' but no factor")
    numbers = {key: rope.number(key, zero=key.startswith("mscale")) for key in Yarn.__dataclass_fields__
               if key != "truncate" and rope.get(key) is not None}
    name = "original_max_position_embeddings"  # outside the object it goes before the one within, as in transformers 5
    numbers[name] = (rope if fields.get(name) is None else fields).whole(name, fields.whole("max_position_embeddings"))
    return theta, Yarn(**numbers, truncate=rope.flag("truncate", True))


def read_dtype(fields: Fields) -> torch.dtype | None:
    name = "dtype" if fields.get("dtype") else "torch_dtype"
    value = fields.get(name)
    if value is not None and str(value) not in DTYPES:
        fields.refuse(name, f"expected one of {', '.join(DTYPES)}")
    return DTYPES.get(value)


def read_stop_ids(fields: Fields, vocab_size: int) -> tuple[int, ...] | None:
    """`eos_token_id`, one or a list of them; None where the file does not say."""
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        fields.refuse("eos_token_id", f"expected token ids below {vocab_size}")
    return None if value is None else tuple(ids)


def read_sampling(fields: Fields) -> dict[str, float]:
    """The defaults of generation_config.json. do_sample false is how a Base checkpoint asks for greedy decoding."""
    if not fields.flag("do_sample", False):
        return {}
    sampling = {"temperature": fields.number("temperature", 1.0, zero=True)}
    if fields.get("top_k") is not None:
        sampling["top_k"] = fields.whole("top_k", zero=True)
    if fields.get("top_p") is not None:
        sampling["top_p"] = fields.number("top_p")
        if sampling["top_p"] > 1:
            fields.refuse("top_p", "expected at most 1")
    return sampling


def read_quantization(fields: Fields) -> tuple[int, int] | None:
    """The block that shares one scale, (rows, columns), or None where the weights are not quantised."""
    if fields.get("quantization_config") is None:
        return None
    quantization = fields.object("quantization_config")
    known = {"quant_method": ("fp8",), "fmt": (None, "e4m3"), "activation_scheme": (None, "dynamic"),
             "weight_block_size": ([128, 128],)}
    for name, values in known.items():
        if quantization.get(name) not in values:
            fields.refuse("quantization_config", f"{name} {quantization.get(name)!r} is not known; "
                          "only FP8 (e4m3) weights in blocks of 128 x 128 are")
    return tuple(quantization.values["weight_block_size"])
