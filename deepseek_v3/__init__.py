"""DeepSeek-V3. README.md tells the story; READING_ORDER is the order of the files.

The folder engine/ makes the same numbers faster, reads more formats and talks to the terminal; the lesson is complete
without it.
"""

import importlib
import warnings

READING_ORDER = ("model", "layers", "yarn", "mla", "moe", "generate", "speculative", "tokenizer", "config", "weights",
                 "main")
NAMES = {"DeepseekV3Config": ("config", "Config"), "DeepseekV3": ("model", "Model")}

# NumPy is not needed here, and PyTorch says at every start that it could not find it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")


def __getattr__(name: str) -> type:
    """`deepseek_v3.DeepseekV3` and `.DeepseekV3Config`, imported when they are asked for: torch takes seconds."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = NAMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
