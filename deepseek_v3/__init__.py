"""DeepSeek-V3. Read README.md, then the files in this order:

config, tokenizer, layers, attention, mla, moe, model, weights, generate, speculative, main.
The folder engine/ is not needed for the lesson.
"""

import importlib
import warnings

# NumPy is not needed here, and PyTorch says at every start that it could not find it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

NAMES = {"DeepseekV3Config": ("config", "Config"), "DeepseekV3": ("model", "Model")}


def __getattr__(name: str) -> type:
    """`deepseek_v3.DeepseekV3` and `deepseek_v3.DeepseekV3Config`, imported when they are asked for: torch takes seconds."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = NAMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
