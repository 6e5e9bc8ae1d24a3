"""Small checkpoints with packed weights: AWQ, GPTQ and compressed-tensors, as their definitions say.

Words are packed here from what each format says of a value's place, and not by the code that unpacks them.
scripts/make_reference.py and the tests both build from here.
"""

from pathlib import Path

import torch

from tests.seeded import (
    deepseek_v3_config, qwen3_config, qwen3_moe_config, seeded_tensor, shapes_of, write_checkpoint)

CONFIGS = {"qwen3": qwen3_config, "qwen3_moe": qwen3_moe_config, "deepseek_v3": deepseek_v3_config}
KEPT = "model.layers.0.self_attn.o_proj"  # stays as it is
AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ: the value that stands at place 0, 1, … of a word


def words(matrix: torch.Tensor, bits: int, places: list[int] | None = None) -> torch.Tensor:
    """(rows, columns) of 0…2^bits - 1 -> (rows, columns / p) int32: p neighbours share a word, the first in its lowest
    bits, or as `places` says."""
    p = 32 // bits
    whole = torch.nn.functional.pad(matrix.long(), (0, -matrix.shape[1] % p)).unflatten(1, (-1, p))
    whole = sum(whole[..., value] << bits * place for place, value in enumerate(places or range(p)))
    return (whole - (whole >= 2**31) * 2**32).int().contiguous()  # as a signed number


def quantised(name: str, shape: tuple[int, int], bits: int, group: int, dtype: torch.dtype, symmetric: bool,
              order: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """(q (O, I) from 0 on, scale (O, G), zero (O, G), each column's group, what they mean in float32)."""
    (O, I), middle = shape, 2 ** (bits - 1)
    groups = (torch.arange(I) if order is None else order) // group
    G = -(-I // group)
    W = seeded_tensor(name, shape, 0.1).float()
    scale = torch.stack([W[:, groups == g].abs().amax(1) / (middle - 1) for g in range(G)], 1).clamp(min=1e-3).to(dtype)
    zero = torch.full((O, G), middle)
    if not symmetric:
        zero = zero + torch.arange(O * G).view(O, G) % 7 - 3
    q = (W / scale.float()[:, groups]).round().add(zero[:, groups]).clamp(0, 2 * middle - 1).long()
    meant = torch.empty(shape)
    for i in range(I):
        meant[:, i] = (q[:, i] - zero[:, groups[i]]) * scale[:, groups[i]].float()
    return q, scale, zero, groups, meant


def awq(name, shape, bits=4, group=32, dtype=torch.float16, symmetric=False):
    q, scale, zero, _, meant = quantised(name, shape, bits, group, dtype, symmetric)
    return {"qweight": words(q.T, 4, AWQ_PLACES), "qzeros": words(zero.T, 4, AWQ_PLACES),
            "scales": scale.T.contiguous()}, meant


def gptq(name, shape, bits=4, group=32, dtype=torch.float16, symmetric=True, desc_act=False, g_idx=True, less=1):
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(1)) if desc_act else None
    q, scale, zero, groups, meant = quantised(name, shape, bits, group, dtype, symmetric, order)
    out = {"qweight": words(q, bits).T.contiguous(), "qzeros": words(zero.T - less, bits),
           "scales": scale.T.contiguous()}
    return out | ({"g_idx": groups.int()} if g_idx else {}), meant


def compressed(name, shape, bits=4, group=32, dtype=torch.bfloat16, symmetric=True, act_order=False):
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(1)) if act_order else None
    q, scale, zero, groups, meant = quantised(name, shape, bits, group, dtype, symmetric, order)
    out = {"weight_packed": words(q, bits), "weight_scale": scale, "weight_shape": torch.tensor(shape)}
    if not symmetric:
        out["weight_zero_point"] = words(zero.T, bits).T.contiguous()
    return out | ({"weight_g_idx": groups.int()} if act_order else {}), meant


def of_awq(group, **more):
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True,
            "modules_to_not_convert": None} | more


def of_gptq(group, bits=4, **more):
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True,
            "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False} | more


def of_compressed(group, bits=4, **more):
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
               "actorder": None, "dynamic": False, "block_structure": None, "observer": "minmax"} | more
    if group is None:
        weights["strategy"] = "channel"
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "kv_cache_scheme": None,
            "quantization_status": "compressed", "ignore": ["lm_head", "re:.*mlp.gate$", KEPT], "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None,
                            "output_activations": None}}}


# Widths that groups of 32 divide.
DENSE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS = {"qwen3": DENSE, "qwen3_moe": DENSE | {"moe_intermediate_size": 32}, "deepseek_v3": {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "q_lora_rank": 64, "kv_lora_rank": 32,
    "num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 16}}
RELEASES = {  # how a matrix is stored, and quantization_config
    "awq": (awq, {}, of_awq(32)),
    "awq, whole columns": (awq, {"group": None}, of_awq(-1)),
    "awq, groups of 16": (awq, {"group": 16}, of_awq(16)),
    "gptq": (gptq, {}, of_gptq(32)),
    "gptq, no g_idx": (gptq, {"g_idx": False}, of_gptq(32)),
    "gptq, groups of 64": (gptq, {"group": 64}, of_gptq(64)),
    "gptq, whole columns": (gptq, {"group": None}, of_gptq(-1)),
    "gptq, zero points": (gptq, {"symmetric": False}, of_gptq(32, sym=False)),
    "gptq v2": (gptq, {"symmetric": False, "less": 0}, of_gptq(32, checkpoint_format="gptq_v2")),
    "gptq, desc_act": (gptq, {"desc_act": True, "symmetric": False}, of_gptq(32, desc_act=True, sym=False)),
    "gptq, bfloat16": (gptq, {"dtype": torch.bfloat16}, of_gptq(32)),
    "gptq, 8 bits": (gptq, {"bits": 8}, of_gptq(32, 8)),
    "gptq, 8 bits, desc_act": (gptq, {"bits": 8, "desc_act": True}, of_gptq(32, 8, desc_act=True)),
    "gptq, 8 bits, whole columns": (gptq, {"bits": 8, "group": None}, of_gptq(-1, 8)),
    "compressed": (compressed, {}, of_compressed(32)),
    "compressed, zero points": (compressed, {"symmetric": False}, of_compressed(32, symmetric=False)),
    "compressed, float16": (compressed, {"dtype": torch.float16}, of_compressed(32)),
    "compressed, act order": (compressed, {"act_order": True}, of_compressed(32, actorder="group")),
    "compressed, whole columns": (compressed, {"group": None}, of_compressed(None)),
    "compressed, 8 bits": (compressed, {"bits": 8, "group": None}, of_compressed(None, 8)),
    "compressed, 8 bits, groups": (compressed, {"bits": 8}, of_compressed(32, 8)),
    "compressed, 8 bits, zero points": (compressed, {"bits": 8, "group": None, "symmetric": False},
                                        of_compressed(None, 8, symmetric=False)),
}


def is_packed(name: str, shape: tuple[int, ...]) -> bool:
    """All projections but one, as a modules_to_not_convert or an ignore list may ask."""
    return "_proj" in name and KEPT not in name and len(shape) == 2


def write(folder: Path, package: str, release: str, plain: bool = False, torch_dtype: str = "float32",
          only: str = "", head: bool = False, **changes: object) -> Path:
    """A small checkpoint of that format, or of what its numbers mean."""
    store, how, quantization = RELEASES[release]
    config = CONFIGS[package](**WIDTHS[package] | {"tie_word_embeddings": False, "torch_dtype": torch_dtype} | changes)
    tensors, shapes = {}, shapes_of(config)
    packed_names = [name for name, shape in shapes.items() if is_packed(name, shape) and only in name]
    for name in packed_names + ["lm_head.weight"] * head:
        shape = shapes.pop(name)
        packed, meant = store(name, shape, **how | {"group": how.get("group", 32) or shape[1]})
        stored = {"weight": meant.to(getattr(torch, torch_dtype))} if plain else packed
        tensors |= {name.removesuffix("weight") + leaf: tensor for leaf, tensor in stored.items()}
    config |= {} if plain else {"quantization_config": quantization}
    return write_checkpoint(folder, config, getattr(torch, torch_dtype), shapes=shapes, **tensors)
