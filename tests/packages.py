"""The packages under test: what holds for all of them stands once and is run for each."""

import importlib
from types import ModuleType

import torch

# package -> its embedded checkpoint
PACKAGES = {"qwen3": "Qwen3-Tiny", "qwen3_moe": "Qwen3-MoE-Tiny", "deepseek_v3": "DeepSeek-V3-Tiny"}


def module(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")


def with_engine(package: str, model: torch.nn.Module) -> torch.nn.Module:
    """The same model with the engine's parts in it, as load_model swaps them in."""
    faster = module(package, "engine.parts").FASTER
    for part in model.modules():
        part.__class__ = faster.get(type(part), type(part))
    return model


def runs_engine(model: torch.nn.Module) -> bool:
    """Whether a part of the model is of the engine."""
    return any(".engine." in type(part).__module__ for part in model.modules())


def without_compiler(monkeypatch, package: str, compiled=lambda function: function) -> None:
    """Let the compiled step run what `compiled` makes of its function: as it stands, in no time."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled(function))
    # Else PyTorch's compiler is imported to be asked, which takes seven seconds.
    monkeypatch.setattr(module(package, "engine.compiled"), "compiler_options", lambda device: {})


def stack_on_the_cpu(monkeypatch, package: str, one_kernel: bool = False) -> None:
    """Let load_model stack experts as on a GPU, and forward take grouped_mm for the one kernel that it is there."""
    experts = module(package, "engine.experts")
    real, gpu = experts.type_of_stacks, torch.device("cuda")
    monkeypatch.setattr(experts, "type_of_stacks", lambda config, files, device, *more: real(config, files, gpu, *more))
    monkeypatch.setattr(experts, "grouped_mm_is_one_kernel", lambda *_: one_kernel)


def force_form(attention: torch.nn.Module, absorb: bool | None) -> None:
    """The absorbed or the expanded form of latent attention; None lets it take the one with fewer operations."""
    vars(attention).pop("absorbs", None)
    if absorb is not None:
        attention.absorbs = lambda T, S: absorb
