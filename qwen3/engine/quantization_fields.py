"""How a checkpoint says that its weights are quantised: which spellings of FP8 are read, and what is refused.

Integers of four or eight bits are in integer_fields.py.

Published in many spellings: DeepSeek's and Qwen's `fp8`, `compressed-tensors` (Red Hat), `modelopt` (NVIDIA),
`fbgemm_fp8` (Meta). All of them mean the formula of quantized.py, and `read_quantization` accepts what does. Such
checkpoints also quantise activations, with scales that are stored (static) or computed (dynamic). Here activations
stay in the wider type, so those scales are not used.
"""

from pathlib import Path

from .fields import Fields, read_json, short
from .integer_fields import read_integers

OTHERS = {  # what a quant_method or a quant_algo stands for
    "awq": "AWQ, 4 bits", "gptq": "GPTQ, 4 or 8 bits", "auto-round": "AutoRound, 4 bits",
    "bitsandbytes": "bitsandbytes", "mxfp4": "MXFP4, 4 bits", "nvfp4": "NVFP4, 4 bits", "hqq": "HQQ",
    "eetq": "EETQ, 8 bits", "aqlm": "AQLM, 2 bits", "quark": "Quark", "torchao": "torchao", "bitnet": "BitNet",
    "higgs": "HIGGS", "int8": "8-bit integers", "pack-quantized": "4-bit integers",
}
# What is known of the values of a field, in whichever spelling has it; None stands for a field that is absent.
TOP_LEVEL = {"fmt": ("e4m3", "float8_e4m3fn"), "activation_scheme": ("dynamic", "static"),
             "scale_fmt": ("ue8m0", "float")}
WEIGHTS = {"num_bits": (8,), "type": ("float",), "symmetric": (None, True), "group_size": (None, 0, -1),
           "strategy": (None, "tensor", "channel", "block")}
MARKS = ("quant_method", "quant_algo", "config_groups", "fmt", "activation_scheme", "weight_block_size")


def read_quantization(fields: Fields, directory: Path) -> dict[str, object]:
    """{"quantization": a format or None, "weight_block_size": (rows, columns) or None}; ValueError for others."""
    mlx = fields.get("quantization")
    if mlx is not None and fields.get("quantization_config", {}) in ({}, mlx):
        bits = fields.object("quantization").get("bits", 4)
        raise ValueError(f"{fields.path}: quantization says {short(bits)} bits: weights in MLX's format, which mlx-lm "
                         "reads; get the release in bfloat16 or FP8")
    beside = directory / "hf_quant_config.json"
    if fields.get("quantization_config") not in (None, {}):
        q, where = fields.object("quantization_config"), f"{fields.path}: quantization_config"
    elif beside.is_file():
        q, where = Fields(beside, read_json(beside)).object("quantization"), f"{beside}: quantization"
    else:
        return {"quantization": None, "weight_block_size": None}

    def refuse(field: str, value: object, why: str = "") -> None:
        key = str(value).lower()
        what = next((f" ({text})" for kind, text in OTHERS.items() if kind in key), "")
        raise ValueError(f"{where}: {field} {short(value)} is not known{what}{why}; FP8 weights (e4m3) are, and those "
                         "of AWQ, GPTQ and pack-quantized in 4 or 8 bits: get such a release or the one in bfloat16")

    method, algo, groups = q.get("quant_method"), q.get("quant_algo"), q.get("config_groups")
    if rotation := q.get("transform_config"):  # a Hadamard rotation
        refuse("transform_config", rotation)
    sparsity = q.get("sparsity_config")  # weights left out
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format", "dense") == "dense"):
        refuse("sparsity_config", sparsity)
    if integers := read_integers(q, refuse):
        return integers
    if algo is not None and algo not in ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"):
        refuse("quant_algo", algo)
    if method not in (None, "fp8", "compressed-tensors", "modelopt", "fbgemm_fp8"):
        refuse("quant_method", method)
    if q.get("bits") not in (None, 8) or q.get("load_in_4bit") or q.get("load_in_8bit"):
        refuse("bits", q.get("bits", 4))
    if method in ("compressed-tensors", "modelopt") and groups is None and algo is None:
        refuse("quant_method", method, " without config_groups or quant_algo")
    if q.get("format") not in (None, "float-quantized", "naive-quantized", "dense"):
        refuse("format", q.get("format"))
    for name, known in TOP_LEVEL.items():
        if q.get(name) is not None and q.get(name) not in known:
            refuse(name, q.get(name))
    if all(q.get(name) is None for name in MARKS):
        refuse("quant_method", None)
    block = read_block(q, "weight_block_size", refuse)
    for group in groups.values() if isinstance(groups, dict) else [groups] if groups is not None else []:
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            refuse("config_groups", groups)
        for name, known in WEIGHTS.items():
            if weights.get(name) not in known:
                refuse(f"weights {name}", weights.get(name))
        block = read_block(Fields(fields.path, weights), "block_structure", refuse) or block
    return {"quantization": "fp8", "weight_block_size": block}


def read_block(fields: Fields, name: str, refuse) -> tuple[int, int] | None:
    block = fields.get(name)
    if block is None:
        return None
    is_pair = isinstance(block, list) and len(block) == 2
    if not is_pair or not all(type(size) is int and 0 < size < 2**31 for size in block):
        refuse(name, block)
    return tuple(block)
