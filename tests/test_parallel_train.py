"""Training in two processes: the losses and weights of one, also where the two choose different experts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scripts.parallel.train import train
from tests.packages import PACKAGES, module
from tests.ranks import ALONE, ROOT, run_on
from tests.seeded import write_case

CASE = {"qwen3": "grouped", "qwen3_moe": "dense_first", "deepseek_v3": "yarn"}  # of 13 experts 4, of 8 experts 3


def losses(folders: dict[str, str], ways: tuple[str, ...]) -> dict[tuple[str, str], tuple[list[float], torch.Tensor]]:
    """(package, how) -> the losses, and a weight of the last layer, gathered."""
    found, ids = {}, torch.tensor([(7 * i * i + 3 * i) % 131 for i in range(500)])
    for package, folder in folders.items():
        for how in ways:
            model = module(package, "weights").load_model(folder, engine=False)
            steps = list(train(model, ids, how, steps=5, rows=4, length=3, rate=3e-3))  # six tokens in each of two
            weight = model.model.layers[model.config.num_hidden_layers - 1].self_attn.o_proj.weight
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            found[package, how] = steps, whole.detach()
    return found


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    folders = {package: str(write_case(tmp_path / package, package, CASE[package])) for package in PACKAGES}
    alone, every = losses(folders, ("ddp",)), run_on(2, losses, folders, ("ddp", "fsdp"))
    for found in every:
        for (package, how), (steps, weight) in found.items():
            expected, whole = alone[package, "ddp"]
            assert steps == pytest.approx(expected, rel=1e-5), (package, how)
            assert len(set(expected)) == 5
            # On average: Adam divides by the size of a gradient, and one of rounding alone moves its weight too.
            assert (weight - whole).abs().mean() < 1e-6, (package, how)


def refused_rows() -> str:
    try:
        next(train(torch.nn.Linear(2, 2), torch.arange(100), rows=3))
    except ValueError as error:
        return f"{error} ({dist.get_world_size()})"


@pytest.mark.slow
def test_the_command_writes_what_can_be_loaded(tmp_path):
    """And gives a sentence to whoever asks for what is not there."""
    file = tmp_path / "model.safetensors"
    command = [sys.executable, "-m", "scripts.parallel.train", "qwen3"]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command[1:], "--how", "fsdp",
         "--steps", "2", "-o", str(file)], cwd=ROOT, env=os.environ | ALONE, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.count("loss") == 2, run.stderr
    for name in ("config.json", "generation_config.json"):
        Path(tmp_path, name).write_bytes((ROOT / "checkpoints/Qwen3-Tiny" / name).read_bytes())
    assert module("qwen3", "weights").load_model(tmp_path, dtype="bfloat16").config.num_hidden_layers
    for words in (["-m", "nothing"], ["--text", "nothing"]):
        run = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 2 and "nothing" in run.stderr and "Traceback" not in run.stderr
    assert run_on(2, refused_rows)[0] == "2 processes cannot share 3 rows evenly (2)"
