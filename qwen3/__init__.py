"""Qwen3, the dense models. Read README.md, then the files in this order:

config, tokenizer, layers, attention, model, weights, generate, main.
The folder engine/ is not needed for the lesson.
"""

import importlib
import warnings

# NumPy is not needed here, and PyTorch says at every start that it could not find it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

NAMES = {"Qwen3Config": ("config", "Config"), "Qwen3": ("model", "Model")}


def __getattr__(name: str) -> type:
    """`qwen3.Qwen3` and `qwen3.Qwen3Config`, imported when they are asked for: torch takes seconds."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = NAMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
