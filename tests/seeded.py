"""Checkpoints with weights that anybody can make again: integers hashed, no random generator of any version.

scripts/make_reference.py and the tests both build from here, so that only results need to be committed.
"""

import functools
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file


def seeded_tensor(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> torch.Tensor:
    """Uniform float32 numbers around `mean` that depend on name and place alone."""
    count = math.prod(shape)
    # Most tests write the same few small checkpoints, so the numbers of small tensors are kept.
    numbers = kept(name, count).clone() if count < 1 << 13 else centred(name, count)
    return numbers.mul_(std * 12**0.5).add_(mean).view(shape)


def centred(name: str, count: int) -> torch.Tensor:
    """Uniform numbers from -1/2 to 1/2."""
    out = torch.empty(count)
    for start in range(0, count, 1 << 16):  # in pieces that a processor's cache holds
        # Knuth's multiplicative hash, then mixed; in 32 bits, of which the last shift and mask make no sign.
        x = torch.arange(start, min(start + (1 << 16), count), dtype=torch.int32)
        x.mul_(signed(2654435761)).add_(signed(zlib.crc32(name.encode())))
        x.bitwise_xor_((x >> 15) & 0x1FFFF).mul_(signed(2246822519))
        x.bitwise_xor_((x >> 13) & 0x7FFFF).mul_(signed(3266489917))
        x.bitwise_xor_((x >> 16) & 0xFFFF)
        out[start:start + len(x)] = x.bitwise_xor_(-1 << 31)  # 0 … 2^32 - 1 as -2^31 … 2^31 - 1, rounded to float32
    return out.mul_(2**-32)


kept = functools.lru_cache(maxsize=8192)(centred)


def signed(number: int) -> int:
    """A number of 32 bits, as a signed one of the same bits."""
    return number - (1 << 32) if number >= 1 << 31 else number


def mlp_shapes(name: str, D: int, F: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gate_proj": (F, D), f"{name}.up_proj": (F, D), f"{name}.down_proj": (D, F)}


def feed_forward_shapes(config: dict, layer: int) -> dict[str, tuple[int, ...]]:
    """Those of `mlp` in one layer, dense or with experts."""
    D, E = config["hidden_size"], config.get("num_experts", 0)
    if not E or layer in config["mlp_only_layers"] or (layer + 1) % config["decoder_sparse_step"]:
        return mlp_shapes("mlp", D, config["intermediate_size"])
    shapes = {"mlp.gate": (E, D)}
    for expert in range(E):
        shapes |= mlp_shapes(f"mlp.experts.{expert}", D, config["moe_intermediate_size"])
    if shared := config.get("shared_expert_intermediate_size"):
        shapes |= mlp_shapes("mlp.shared_expert", D, shared) | {"mlp.shared_expert_gate": (1, D)}
    return shapes


def qwen3_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as facts of the published checkpoints and not from our model; dense or with experts."""
    D, N = config["hidden_size"], config["head_dim"]
    H, K, V = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (D,), "post_attention_layernorm": (D,),
            "self_attn.q_norm": (N,), "self_attn.k_norm": (N,),
            "self_attn.q_proj": (H * N, D), "self_attn.k_proj": (K * N, D), "self_attn.v_proj": (K * N, D),
            "self_attn.o_proj": (D, H * N), **feed_forward_shapes(config, layer),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def deepseek_v3_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The same for DeepSeek-V3's architecture, with the MTP module where the config announces it."""
    D, V, H = config["hidden_size"], config["vocab_size"], config["num_attention_heads"]
    R, Q, L = config["kv_lora_rank"], config["q_lora_rank"], config["num_hidden_layers"]
    N, P, M = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    E, F = config["n_routed_experts"], config["moe_intermediate_size"]
    queries = {"q_proj": (H * (N + P), D)} if Q is None else {
        "q_a_proj": (Q, D), "q_a_layernorm": (Q,), "q_b_proj": (H * (N + P), Q)}
    attention = queries | {"kv_a_proj_with_mqa": (R + P, D), "kv_a_layernorm": (R,), "kv_b_proj": (H * (N + M), R),
                           "o_proj": (D, H * M)}
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for layer in range(L + config["num_nextn_predict_layers"]):
        names = {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        names |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        if layer < config["first_k_dense_replace"]:
            names |= mlp_shapes("mlp", D, config["intermediate_size"])
        else:
            names |= {"mlp.gate": (E, D)} | mlp_shapes("mlp.shared_experts", D, F * config["n_shared_experts"])
            for expert in range(E):
                names |= mlp_shapes(f"mlp.experts.{expert}", D, F)
            shapes[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = (E,)
        if layer == L:
            names |= {"enorm": (D,), "hnorm": (D,), "eh_proj": (D, 2 * D), "shared_head.norm": (D,)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in names.items()}
    return shapes if config["tie_word_embeddings"] else shapes | {"lm_head.weight": (V, D)}


def write_checkpoint(folder: Path, config: dict, dtype: torch.dtype = torch.float32, std: float = 0.25,
                     shapes: dict[str, tuple[int, ...]] | None = None, **tensors: torch.Tensor) -> Path:
    """config.json and model.safetensors in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    made = {}
    for name, shape in (shapes_of(config) if shapes is None else shapes).items():
        if name.endswith("_bias"):
            made[name] = seeded_tensor(name, shape, 0.1)  # float32 whatever the others are
        elif len(shape) == 1:
            made[name] = seeded_tensor(name, shape, 0.3, mean=1.0).to(dtype)
        else:
            made[name] = seeded_tensor(name, shape, std).to(dtype)
    save_file(made | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shapes_of(config: dict) -> dict[str, tuple[int, ...]]:
    return qwen3_shapes(config) if config["model_type"].startswith("qwen3") else deepseek_v3_shapes(config)


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


def qwen3_moe_config(**changes: object) -> dict:
    return qwen3_config(**{
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "tie_word_embeddings": False,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False,
        "router_aux_loss_coef": 0.001} | changes)


def deepseek_v3_config(**changes: object) -> dict:
    """A small DeepSeek-V3 in the published generation of names; no two sizes are alike that could be mistaken."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 131, "hidden_size": 40,
        "intermediate_size": 56, "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
        "num_key_value_heads": 3, "q_lora_rank": 28, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
        "v_head_dim": 14, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0},
        "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
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
    "yarn_all_fields": {"head_dim": 16,
                        "rope_scaling": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.3}},
    "yarn_mscale": {"head_dim": 32, "tie_word_embeddings": False,
                    "rope_scaling": YARN | {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
}
QWEN3_MOE_CASES = {
    "two_of_eight": {},
    "one_expert": {"num_experts_per_tok": 1, "head_dim": 16},
    "one_expert_not_normalised": {"num_experts_per_tok": 1, "norm_topk_prob": False, "rope_theta": 10000.0},
    "all_experts": {"num_experts": 5, "num_experts_per_tok": 5, "num_key_value_heads": 1},
    "three_not_normalised": {"num_experts_per_tok": 3, "norm_topk_prob": False, "tie_word_embeddings": True},
    "dense_in_between": {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "dense_first": {"mlp_only_layers": [0], "rms_norm_eps": 1e-5, "num_experts": 13, "num_experts_per_tok": 4},
    "ties": {"num_experts_per_tok": 3},  # experts 2e and 2e + 1 are alike, see `tied_pairs`
    "yarn": {"rope_scaling": YARN, "moe_intermediate_size": 9},
    "shared_expert": {"shared_expert_intermediate_size": 20, "norm_topk_prob": False},
}

DEEPSEEK_YARN = deepseek_v3_config()["rope_scaling"]
DEEPSEEK_V3_CASES = {
    "yarn": {},
    "moonlight": {"q_lora_rank": None, "rope_scaling": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
                  "rms_norm_eps": 1e-3, "rope_theta": 50000.0, "num_nextn_predict_layers": 0},
    "kimi": {"n_group": 1, "topk_group": 1, "n_routed_experts": 13, "num_nextn_predict_layers": 0,
             "rope_theta": 50000.0, "rope_scaling": DEEPSEEK_YARN | {"beta_fast": 1.0, "beta_slow": 1.0}},
    "two_large_groups": {"n_routed_experts": 10, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    "three_groups": {"n_routed_experts": 9, "n_group": 3, "num_experts_per_tok": 5, "num_hidden_layers": 2},
    "negative_biases": {"num_experts_per_tok": 4},  # every score that chooses is below 0, see `write_case`
    "one_expert_not_normalised": {"num_experts_per_tok": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "three_not_normalised": {"norm_topk_prob": False, "first_k_dense_replace": 0, "q_lora_rank": None},
    "mscales_differ": {"rope_scaling": DEEPSEEK_YARN | {"factor": 8.0, "mscale": 0.6, "mscale_all_dim": 1.3}},
    "one_mscale": {"rope_scaling": {k: v for k, v in DEEPSEEK_YARN.items() if k != "mscale"} | {"mscale_all_dim": 0.7}},
    "no_mscale": {"rope_scaling": YARN, "qk_rope_head_dim": 12, "num_attention_heads": 1, "num_key_value_heads": 1},
    "wide_values": {"v_head_dim": 26, "qk_nope_head_dim": 6, "kv_lora_rank": 44, "q_lora_rank": 9},
    "half_split": {"rope_interleave": False, "tie_word_embeddings": True},
    "dense_but_for_the_draft": {"first_k_dense_replace": 3, "num_hidden_layers": 3},
}


def tied_pairs(config: dict) -> dict[str, torch.Tensor]:
    """Experts in pairs that share weight and router row: whichever of a pair is chosen, the result is the same."""
    tensors = {}
    for name, shape in qwen3_shapes(config).items():
        if ".mlp.experts." in name and int(name.split(".")[5]) % 2:
            twin = ".".join([*name.split(".")[:5], str(int(name.split(".")[5]) - 1), *name.split(".")[6:]])
            tensors[name] = seeded_tensor(twin, shape, 0.25)
        elif name.endswith("mlp.gate.weight"):
            tensors[name] = seeded_tensor(name, shape, 0.25)[::2].repeat_interleave(2, 0)
    return tensors


def write_case(folder: Path, package: str, name: str) -> Path:
    """The checkpoint of one of the cases above."""
    if package == "qwen3":
        return write_checkpoint(folder, qwen3_config(**QWEN3_CASES[name]))
    if package == "deepseek_v3":
        config = deepseek_v3_config(**DEEPSEEK_V3_CASES[name])
        biases = {tensor: shape for tensor, shape in deepseek_v3_shapes(config).items() if tensor.endswith("_bias")}
        below = {tensor: seeded_tensor(tensor, shape, 0.1, mean=-3.0) for tensor, shape in biases.items()}
        return write_checkpoint(folder, config, **(below if name == "negative_biases" else {}))
    config = qwen3_moe_config(**QWEN3_MOE_CASES[name])
    return write_checkpoint(folder, config, **(tied_pairs(config) if name == "ties" else {}))


CASES = {"qwen3": QWEN3_CASES, "qwen3_moe": QWEN3_MOE_CASES, "deepseek_v3": DEEPSEEK_V3_CASES}
PROMPT = [7, 3, 99, 130, 0, 41, 41, 5, 17, 88, 62, 12]
LONG_PROMPT = [(i * i + 3 * i) % 131 for i in range(100)]  # beyond the 32 positions that YARN says were trained

# The published shape of Qwen3-0.6B (facts: its config.json).
QWEN3_0_6B = qwen3_config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                          num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
                          max_window_layers=28, torch_dtype="bfloat16")
# Two layers of Qwen3-30B-A3B's shape, with a smaller vocabulary so that they fit anywhere.
QWEN3_30B_A3B_PAIR = qwen3_moe_config(vocab_size=4096, hidden_size=2048, intermediate_size=6144, num_hidden_layers=2,
                                      num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
                                      num_experts_per_tok=8, moe_intermediate_size=768, max_position_embeddings=40960,
                                      max_window_layers=48, torch_dtype="bfloat16")
# A dense and a sparse layer of DeepSeek-V3's width, with fewer experts and a smaller vocabulary: 1.1 billion weights.
DEEPSEEK_V3_PAIR = deepseek_v3_config(
    vocab_size=4096, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=2,
    num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=8, num_experts_per_tok=3, first_k_dense_replace=1,
    num_nextn_predict_layers=0, max_position_embeddings=163840, torch_dtype="bfloat16", rope_scaling={
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0})
# Positions for a prompt of twelve tokens, from the first to the last that DeepSeek-V3 knows; 4096 were trained without
# YaRN.
FAR = [0, 3, 77, 4095, 4096, 4097, 5000, 20000, 65537, 131071, 163000, 163839]
# package -> a full shape, and what spreads the prompt's ids over its vocabulary
FULL = {"qwen3": (QWEN3_0_6B, 1009), "qwen3_moe": (QWEN3_30B_A3B_PAIR, 31), "deepseek_v3": (DEEPSEEK_V3_PAIR, 31)}
