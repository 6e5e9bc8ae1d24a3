"""The packages under test: what holds for all of them stands once and is run for each."""

import importlib
from types import ModuleType

# package -> the class of its model, its embedded checkpoint
PACKAGES = {"qwen3": ("Qwen3", "Qwen3-Tiny"), "qwen3_moe": ("Qwen3Moe", "Qwen3-MoE-Tiny"),
            "deepseek_v3": ("DeepseekV3", "DeepSeek-V3-Tiny")}


def module(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")
