"""Checkpoints with weights that anybody can make again: integers hashed, no random generator of any version.

scripts/make_reference.py and the tests both build from here, so that only results need to be committed.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file


def seeded_tensor(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> torch.Tensor:
    """Uniform float32 numbers around `mean` that depend on name and place alone."""
    count = 1
    for size in shape:
        count *= size
    out = torch.empty(count)
    for start in range(0, count, 1 << 22):
        x = torch.arange(start, min(start + (1 << 22), count))
        x = (x * 2654435761 + zlib.crc32(name.encode())) & 0xFFFFFFFF  # Knuth's multiplicative hash, then mixed
        x = ((x ^ (x >> 15)) * 2246822519) & 0xFFFFFFFF
        x = ((x ^ (x >> 13)) * 3266489917) & 0xFFFFFFFF
        out[start:start + len(x)] = ((x ^ (x >> 16)).double() / 2**32 - 0.5).float()
    return (out * (std * 12**0.5) + mean).view(shape)


def qwen3_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as facts of the published checkpoints and not from our model."""
    D, F, N = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, K, V = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (D,), "post_attention_layernorm": (D,), "self_attn.q_norm": (N,), "self_attn.k_norm": (N,),
            "self_attn.q_proj": (H * N, D), "self_attn.k_proj": (K * N, D), "self_attn.v_proj": (K * N, D),
            "self_attn.o_proj": (D, H * N), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def write_checkpoint(folder: Path, config: dict, dtype: torch.dtype = torch.float32, std: float = 0.25,
                     shapes: dict[str, tuple[int, ...]] | None = None, **tensors: torch.Tensor) -> Path:
    """config.json and model.safetensors in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    made = {name: seeded_tensor(name, shape, 0.3 if len(shape) == 1 else std, mean=float(len(shape) == 1)).to(dtype)
            for name, shape in (shapes or qwen3_shapes(config)).items()}
    save_file(made | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def qwen3_config(**changes: object) -> dict:
    """A small Qwen3 in the published generation of names; H*N is not D, K is less than H."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 131, "hidden_size": 40,
        "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 10, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
        "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 3,
        "torch_dtype": "float32", "eos_token_id": None, "bos_token_id": None,
    } | changes


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# What the reference is asked to compute: name -> changes to the config.
QWEN3_CASES = {
    "grouped": {},
    "one_key_head_untied": {"num_key_value_heads": 1, "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "all_key_heads": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 22, "rope_theta": 10000.0},
    "wide_heads_one_layer": {"hidden_size": 24, "head_dim": 64, "num_hidden_layers": 1, "rope_theta": 5000000},
    "two_values_per_head": {"head_dim": 2, "num_attention_heads": 12, "num_key_value_heads": 4, "num_hidden_layers": 5},
    "yarn": {"rope_scaling": YARN},
    "yarn_all_fields": {"head_dim": 16, "rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    "yarn_mscale": {"head_dim": 32, "tie_word_embeddings": False,
                    "rope_scaling": YARN | {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
}
PROMPT = [7, 3, 99, 130, 0, 41, 41, 5, 17, 88, 62, 12]
LONG_PROMPT = [(i * i + 3 * i) % 131 for i in range(100)]  # beyond the 32 positions that YARN says were trained

# The published shape of Qwen3-0.6B (facts: its config.json).
QWEN3_0_6B = qwen3_config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                          num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
                          max_window_layers=28, torch_dtype="bfloat16")
