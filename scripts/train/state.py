"""A training that was interrupted goes on as if it had not been: everything that it needs is in one safetensors file.

That is the weights in float32, what the optimizers remember of each, the step, and what was decided at the start. The
batches need nothing: each is made from the seed and its step's number alone.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .training import Training

NAME = "training.safetensors"


def save_state(training: Training, notes: dict, folder: Path) -> None:
    """Written beside the old one and then renamed, so that a kill leaves one of them whole."""
    tensors = {f"weight.{name}": p.detach() for name, p in trained(training.model).items()}
    for i, optimizer in enumerate(training.optimizers):
        for index, memory in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{index}.{what}": torch.as_tensor(value) for what, value in memory.items()}
    unfinished = folder / f"{NAME}.part"
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, unfinished, metadata={"notes": json.dumps(notes | {"step": training.step})})
    unfinished.replace(folder / NAME)


def read_notes(folder: Path) -> dict | None:
    """What an unfinished training in `folder` wrote down; None without one. ValueError for a damaged file."""
    if not (folder / NAME).is_file():
        return None
    try:
        with safe_open(folder / NAME, framework="pt") as file:
            return json.loads(file.metadata()["notes"])
    except Exception as error:  # the library raises its own kinds
        why = str(error)[:80]
        raise ValueError(f"{folder / NAME} is damaged ({why}): begin anew with --restart") from None


def load_state(training: Training, folder: Path) -> None:
    """Take weights, optimizers and the step's number from a folder where a run was stopped."""
    with safe_open(folder / NAME, framework="pt") as file, torch.no_grad():
        training.step = json.loads(file.metadata()["notes"])["step"]
        for name, p in trained(training.model).items():
            p.copy_(file.get_tensor(f"weight.{name}"))
        for i, optimizer in enumerate(training.optimizers):
            state = {}
            for key in file.keys():
                kind, *rest = key.split(".", 3)
                if kind == "optimizer" and rest[0] == str(i):
                    state.setdefault(int(rest[1]), {})[rest[2]] = file.get_tensor(key)
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that training changes, by the optimizers or, as DeepSeek-V3's bias, by a rule."""
    return {name: p for name, p in model.named_parameters()
            if p.requires_grad or name.endswith("e_score_correction_bias")}
