"""The seeded cases, each written and loaded once for all tests that only read them."""

import functools
import tempfile
import zlib
from pathlib import Path

import torch

from tests.packages import module
from tests.seeded import write_case

FOLDERS = tempfile.TemporaryDirectory(prefix="cases-")  # removed when Python ends
LENT: dict[tuple, torch.nn.Module] = {}  # those that were handed out since changed_models() looked


@functools.cache
def case_folder(package: str, name: str) -> Path:
    """The checkpoint of a case. To change its files, use write_case."""
    return write_case(Path(FOLDERS.name, package, name), package, name)


def loaded(package: str, name: str, dtype: str | None = None, engine: bool = True) -> torch.nn.Module:
    """The model of a case, to be read: who trains, casts or patches one loads it from case_folder."""
    key = package, name, dtype, engine
    LENT[key], _ = load_once(*key)
    return LENT[key]


@functools.cache
def load_once(package: str, name: str, dtype: str | None, engine: bool) -> tuple[torch.nn.Module, list]:
    with torch.inference_mode(False):  # whoever comes first, its weights are fit for all
        model = module(package, "weights").load_model(case_folder(package, name), dtype=dtype, engine=engine)
    return model, state(model)


def state(model: torch.nn.Module) -> list:
    """What a test may leave changed: numbers, types, gradients, modes, hooks and whatever was set on a part."""
    parts = [(name, type(part), part.training, sorted(vars(part)),
              sum(len(value) for key, value in vars(part).items() if key.endswith("_hooks")))
             for name, part in model.named_modules()]
    return parts + [(name, weight.dtype, weight.requires_grad, weight.grad is None,
                     zlib.crc32(weight.detach().contiguous().view(torch.uint8).numpy()))
                    for name, weight in model.named_parameters()]


def changed_models() -> list[tuple]:
    """(package, case, type, engine) of the models that tests have changed since this was last asked."""
    changed = [key for key, model in LENT.items() if state(model) != load_once(*key)[1]]
    LENT.clear()
    return changed
