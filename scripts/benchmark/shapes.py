"""Random checkpoints of published shapes, to measure shapes that are not downloaded."""

import json
import math
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen3.engine.supported import PACKAGES as MODEL_TYPES  # model_type -> package

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qwen3", "qwen3_moe", "deepseek_v3")


def published() -> dict[str, tuple[str, dict]]:
    """Name in lower case -> (package, config.json as published); the files that the tests read."""
    shapes = {}
    for package in PACKAGES:
        for name, entry in json.loads((ROOT / f"tests/{package}/published_configs.json").read_text()).items():
            shapes[name.lower()] = package, entry["config"]
    return shapes


def cut(config: dict, layers: int | None) -> dict:
    """The config with its first `layers` layers only (None: all); ValueError if it has no more than that."""
    if layers is None or layers == config["num_hidden_layers"]:
        return config
    if not 0 < layers < config["num_hidden_layers"]:
        raise ValueError(f"--layers {layers}: the shape has {config['num_hidden_layers']}")
    config = config | {"num_hidden_layers": layers, "max_window_layers": layers}
    config.pop("layer_types", None)
    return config


def package_of(folder: Path) -> str:
    """Which package reads this checkpoint; ValueError or FileNotFoundError if none does."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; -m takes a name under checkpoints/ or a folder, "
                                "--shape a published shape")
    kind = json.loads(path.read_text()).get("model_type")
    package = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if package is None:
        raise ValueError(f"{path}: model_type is {kind!r}; there are packages for {', '.join(PACKAGES)}")
    return package


def make(package: str, config: dict, folder: Path, progress=lambda done, total: None) -> Path:
    """Write config.json and random weights (std 0.02), one file per layer; a complete one is left as it is."""
    index = folder / "model.safetensors.index.json"
    if index.exists() and json.loads((folder / "config.json").read_text()) == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    index.unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with torch.device("meta"):
        numbers = import_module(f"{package}.config").Config.from_checkpoint(folder)
        model = import_module(f"{package}.model").Model(numbers)
    linear = import_module(f"{package}.layers").Linear
    files: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = parameter

    # Drawing billions of numbers takes minutes; slices of one pool, each from its own offset, serve as well.
    pool = torch.empty(1 << 24).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight_map, total = {}, 0
    for done, (file, parameters) in enumerate(files.items(), start=1):
        tensors = {}
        for name, parameter in parameters.items():
            if parameter.ndim == 1:
                one = torch.ones(parameter.shape) if "norm" in name else torch.zeros(parameter.shape)
                tensors[name] = one if "bias" in name else one.bfloat16()
                continue
            size, first = parameter.numel(), hash_of(name) % (len(pool) // 2)
            period = len(pool) // 2 - 1  # odd, so that no two rows are the same
            repeats = -(-size // period)
            weight = pool[first:first + period].repeat(repeats)[:size].view(parameter.shape)
            block = numbers.weight_block_size
            owner = model.get_submodule(name.rpartition(".")[0])
            if block and name.startswith("model.layers.") and isinstance(owner, linear):
                tensors[name] = (weight * 1000).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale_inv"] = torch.full([math.ceil(n / b) for n, b in zip(weight.shape, block)], 1e-3)
            else:
                tensors[name] = weight.contiguous()
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        progress(done, len(files))
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return folder


def hash_of(name: str) -> int:
    """The same number in every process, as `hash` is not."""
    return sum((position + 1) * 7919 * byte for position, byte in enumerate(name.encode()))
