"""scripts.train in two processes: the losses and weights of one, and a run that is stopped and goes on in one."""

import re
import select
import signal
import time
from dataclasses import replace

import pytest
import torch

from scripts.train import balance, learn, state, task, together, training
from scripts.train.lora import add_lora
from tests.packages import PACKAGES, module
from tests.ranks import ROOT, run_on
from tests.test_processes import torchrun

pytestmark = pytest.mark.slow
STEPS = {"muon": (5, 5e-3), "lora": (4, 5e-3)}  # how -> steps, learning rate


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, with different numbers of targets. The second process has one, of a single word: few experts."""
    chance = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 299, (3, 16), generator=chance)
    ids[1] = 7 + step
    return ids, torch.where(torch.rand(3, 16, generator=chance) < torch.tensor([[0.3], [0.9], [0.6]]), ids + 1, -100)


def trained(package: str, how: str) -> dict:
    """The losses, the trained weights, and the experts that this process's tokens were sent to at the first step."""
    torch.manual_seed(together.rank())
    config = module(package, "config").Config.from_checkpoint(ROOT / "checkpoints" / PACKAGES[package])
    model = module(package, "model").Model(replace(config, num_hidden_layers=2, vocab_size=300))
    if how == "lora":
        add_lora(model, package, 4)
    together.like_first(p.data for p in model.parameters())
    steps, rate = STEPS[how]
    optimizers = training.muon_and_adamw(model, rate, mixed=False) if how == "muon" else training.adamw(model, rate)
    run, experts = training.Training(model, optimizers, batch, mixed=False), []
    for router in balance.routers(model)[:1]:
        router.register_forward_hook(lambda router, inputs, outputs: experts.append(outputs[1].unique().tolist()))
    losses = [run.run_step(steps) for _ in range(steps)]
    return {"losses": losses, "experts": experts[:1], "weights": {name: p for name, p in state.trained(model).items()}}


def every_way() -> dict[tuple[str, str], dict]:
    found = {(package, how): trained(package, how) for package in PACKAGES for how in STEPS}
    for lengths, tokens in (({160: 1}, 320), ({160: 9, 512: 1}, 600)):
        try:
            together.check_rows(lengths, tokens)
        except ValueError as error:
            found["refused"] = str(error)
    return found


def test_two_processes_make_the_steps_of_one():
    alone, (first, second) = every_way(), run_on(2, every_way)
    assert first.pop("refused") == second.pop("refused") == (
        "2 processes cannot share a step of 600 tokens, which may be 1 row of 512; start 1, or give --tokens 1024")
    for way, expected in alone.items():
        assert first[way]["losses"] == pytest.approx(expected["losses"], rel=1e-5), way
        assert len(set(expected["losses"])) == STEPS[way[1]][0] and second[way]["losses"] == first[way]["losses"]
        for name, weight in expected["weights"].items():
            one, other = (each[way]["weights"][name] for each in (first, second))
            assert torch.equal(one, other), (way, name)
            assert (one - weight).abs().mean() < 1e-5, (way, name)
        if way[0] != "qwen3":
            (used,), (elsewhere,) = first[way]["experts"], second[way]["experts"]
            assert set(used) - set(elsewhere) and len(elsewhere) < 8, way


def test_a_run_of_two_processes_is_stopped_and_goes_on_in_one(tmp_path):
    """Ctrl-C ends all within 5 s, after a step and with what it needs; only the first prints."""
    (tmp_path / "q.jsonl").write_text('{"question": "Who keeps the key?", "answer": "Ada keeps it."}\n')
    cut = tmp_path / "cut"
    with torchrun("-m", "scripts.train", "qwen3", "--data", str(tmp_path / "q.jsonl"), "--from", "Qwen3-Tiny",
                  "--tokens", "320", "--threads", "1", "--dtype", "float32", "--rate", "1e-4", "--steps", "4000",
                  "--output", str(cut)) as run:
        assert select.select([run.process.stdout], [], [], 60)[0], run.process.stderr.read()
        until = time.monotonic() + 60
        while not (cut / state.NAME).exists() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(1)
        run.process.send_signal(signal.SIGINT)
        out, err = run.process.communicate(timeout=5)
        assert run.children() == []
    assert out.count("2 processes, each with 1 threads") == out.count("before the first step") == 1, err
    assert out.count("stopped after step") == 1 and not re.search("^train", err, re.M), err
    plan = task.Plan(**state.read_notes(cut)["plan"])
    # With another number of processes, that of threads may be another too.
    notes = learn.begin(replace(plan, threads=2), cut, replace=False, restart=False)
    assert notes["processes"] == 2 and 0 < notes["step"] == len(notes["losses"])
    again, whole = learn.Run(plan, cut), learn.Run(plan, tmp_path / "whole")
    again.resume(notes)
    while whole.training.step < notes["step"] + 2:
        whole.one_step(plan.steps)
    for _ in range(2):
        again.one_step(plan.steps)
    assert again.losses == pytest.approx(whole.losses, rel=1e-5, abs=2e-5)  # they are kept with five digits
