"""Qwen3-MoE, the mixture of experts. Read README.md, then the files in this order:

config, tokenizer, layers, attention, moe, model, weights, generate, main.
The folder engine/ is not needed for the lesson.
"""

import importlib
import warnings

# NumPy is not needed here, and PyTorch says at every start that it could not find it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

NAMES = {"Qwen3MoeConfig": ("config", "Config"), "Qwen3Moe": ("model", "Model")}


def __getattr__(name: str) -> type:
    """`qwen3_moe.Qwen3Moe` and `qwen3_moe.Qwen3MoeConfig`, imported when they are asked for: torch takes seconds."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = NAMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
