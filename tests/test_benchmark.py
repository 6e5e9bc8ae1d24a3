"""The benchmark's arithmetic, on the embedded checkpoints: bytes, operations, ratios. Never its timings."""

import json
import math
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmark import __main__ as benchmark, compete, contender, machine, measure, report, shapes
from tests.packages import PACKAGES, module

ROOT = measure.ROOT
FOLDERS = {package: ROOT / "checkpoints" / name for package, name in PACKAGES.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_bytes_are_those_of_the_file(package):
    work, stored = report.Work.of(FOLDERS[package]), {}
    for path in FOLDERS[package].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: math.prod(file.get_slice(name).get_shape()) * 2 for name in file.keys()}
    config = json.loads((FOLDERS[package] / "config.json").read_text())
    layers = config["num_hidden_layers"]
    copies = [f"model.layers.{layers}.{name}.weight" for name in ("embed_tokens", "shared_head.head")]  # not kept twice
    stored = {name: size for name, size in stored.items() if name not in copies}
    total = sum(stored.values())
    assert work.package == package and work.file_bytes == pytest.approx(total, rel=1e-3)  # a bias is float32
    experts = sum(size for name, size in stored.items() if ".experts." in name and int(name.split(".")[2]) < layers)
    share = config.get("num_experts_per_tok", 0) / (config.get("num_experts") or config.get("n_routed_experts") or 1)
    drafting = sum(size for name, size in stored.items() if name.startswith(f"model.layers.{layers}."))
    embedding = 0 if config["tie_word_embeddings"] else stored["model.embed_tokens.weight"]
    assert work.weight_bytes == pytest.approx(total - experts * (1 - share) - drafting - embedding, rel=1e-3)
    values = (config["kv_lora_rank"] + config["qk_rope_head_dim"] if package == "deepseek_v3"
              else 2 * config["num_key_value_heads"] * config["head_dim"])
    assert work.cache_bytes == layers * values * 2
    assert work.bytes_of_a_token(1000) == work.weight_bytes + 1000 * work.cache_bytes


@pytest.mark.slow  # counting imports PyTorch's compiler
@pytest.mark.parametrize("package", PACKAGES)
def test_operations_are_those_that_pytorch_counts(package):
    work, T = report.Work.of(FOLDERS[package]), 30
    # The lesson's attention consists of matmuls, which are counted.
    model = module(package, "weights").load_model(FOLDERS[package], dtype="float32", engine=False)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.model(torch.arange(T)[None])
    # It also computes what the mask hides: T² and not T (T + 1) / 2.
    expected = work.operations_of_a_prompt(T) + work.attention_operations * T * (T - 1) // 2
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)  # norms are no matmuls


def test_a_published_shape_in_numbers(tmp_path):
    package, config = shapes.published()["qwen3-0.6b"]
    assert package == "qwen3" and shapes.cut(config, None) == config
    assert shapes.cut(config, 3)["num_hidden_layers"] == 3
    for layers in (0, 29):
        with pytest.raises(ValueError, match="the shape has 28"):
            shapes.cut(config, layers)


@pytest.mark.parametrize("package", PACKAGES)
def test_random_checkpoints_load_and_no_two_rows_are_the_same(tmp_path, package):
    config = json.loads((FOLDERS[package] / "config.json").read_text())
    folder = shapes.make(package, config, tmp_path / "one")
    model = module(package, "weights").load_model(folder)
    assert len(model.model.embed_tokens.weight.unique(dim=0)) == config["vocab_size"]
    assert 0.015 < float(model.model.embed_tokens.weight.float().std()) < 0.025
    written = (folder / "model.safetensors.index.json").stat().st_mtime_ns
    shapes.make(package, config, folder)  # is there already
    assert (folder / "model.safetensors.index.json").stat().st_mtime_ns == written


def test_ratios_are_taken_round_by_round():
    assert report.ratios([10, 20, 30], [5, 20, 10]) == (2, 1, 3)
    results = {"prefill 512": {"ours": [{"seconds": 2.0}]}, "decode 32": {"ours": [{"seconds": 0.1}]}}
    assert report.rates(results, "prefill 512", "ours") == [256]
    assert report.rates(results, "decode 32", "ours") == [10]


def test_the_table_and_the_plot():
    work = report.Work("qwen3", 10**9, 10**9, 10**6, 5 * 10**8, 0, 10**4)
    limits = {"bytes": 1e10, "operations": 1e12}
    start = {"load": 0.1, "first": 0.2, "seconds": 1.0, "anonymous": 1e7}
    results = {"start": {"ours": [start], "them": [start | {"first": 0.8}]},
               "prefill 100": {"ours": [{"seconds": 0.2, "anonymous": 0}], "them": [{"seconds": 0.4, "anonymous": 0}]},
               "decode 1000": {"ours": [{"seconds": 0.4}], "them": [{"seconds": 0.8}]}}
    lines = {line[:24].strip(): line[24:].split() for line in report.table(work, results, limits, "them")}
    assert lines["… to first token"][-2:] == ["0.25", "(0.25-0.25)"]
    assert lines["prefill 100"][:6] == ["500.0", "tok/s", "1000.0", "tok/s", "50%", "250.0"]
    assert lines["decode 1000"][:6] == ["2.5", "tok/s", "5.0", "tok/s", "50%", "1.2"]
    assert lines["decode 1000"][-2] == "2.00"
    two = [{"seconds": 0.2, "in_sums": 0.05, "sums": 12}]
    ranks = {"decode 1000": {"1 process": [{"seconds": 0.4}], "2 ranks": two},
             "sum 0": {"2 ranks": [{"seconds": 2e-5, "bytes": 4096}]}}
    lines = report.shared(ranks, "1 process", "2 ranks", "gloo")
    assert lines[1].split() == "decode 1000 2.5 tok/s 5.0 tok/s 2.00 (2.00-2.00) 12 50.00 ms, 25%".split()
    assert lines[3] == "A sum of 4.1 kB, as of one token, takes 20 µs by itself (gloo)."
    del ranks["decode 1000"]["1 process"]  # too large for one
    assert report.shared(ranks, "1 process", "2 ranks", "gloo")[1].split()[2:5] == ["-", "5.0", "tok/s"]
    two = {"decode 1000": {"ours": [{"seconds": 0.2}]}, "decode 2000": {"ours": [{"seconds": 0.5}]}}
    plot = report.growth(work, two, limits)
    assert "300.0 ms" in plot[2] and "3.00 GB" in plot[2] and plot[2].count("█") > plot[1].count("█")


def test_without_flags_only_what_the_checkpoint_has_room_for_is_measured(monkeypatch, capsys):
    """The embedded checkpoint is the default, and its context is shorter than the longest default prompt."""
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(machine, "matrix_rate", lambda device: (1e9, torch.bfloat16))
    monkeypatch.setattr(machine, "BUSY", 1e9)
    asked = []

    class Stop(Exception):
        pass

    def compete(folder, work, arguments, rivals, tasks):
        for task in tasks:
            fits = task["context"] + task.get("count", -2) + 3 <= work.context_length
            asked.append((task["do"], task["context"], fits))
        raise Stop

    monkeypatch.setattr(measure, "compete", compete)
    for flags in ([], ["--plot"]):
        with pytest.raises(Stop):
            benchmark.main(["-m", "Qwen3-Tiny", *flags])
    assert asked == [(what, n, True) for what, n in (
        ("ids", 32), ("prefill", 512), ("prefill", 2048 // 2), ("decode", 32), ("decode", 1024),
        *(("decode", 32 << i) for i in range(6)))]
    long = {name: trick for name, trick in measure.TRICKS.items() if trick.context == 4096}
    monkeypatch.setattr(measure, "TRICKS", long)
    with pytest.raises(Stop):
        benchmark.main(["-m", "Qwen3-Tiny", "--tricks"])
    assert measure.shortened(4096, 2029) == 1024


class InThisProcess:
    """A contender without a process of its own, with nothing left out and nothing compiled."""

    def __init__(self, folder, package, arguments, who, **how):
        self.program, self.process = contender.Ours(str(folder), "cpu", package), SimpleNamespace(pid=os.getpid())
        self.processes = [self.process]
        self.started = {"load": 0.1, "first": 0.2, "seconds": 1.0, "anonymous": 0}

    def ask(self, **task) -> dict:
        return contender.work(self.program, task)

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("package", PACKAGES)
def test_every_kind_of_measurement_works_on_the_embedded_checkpoints(package, monkeypatch, capsys):
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(machine, "matrix_rate", lambda device: (1e9, torch.bfloat16))
    monkeypatch.setattr(machine, "BUSY", 1e9)
    monkeypatch.setattr(machine, "LOOK", 0)
    monkeypatch.setattr(compete, "Contender", InThisProcess)
    for flags, shown in ([], r"decode 1024 +[\d.]+ tok/s"), (["--plot"], r"\n   1024 .* MB .*│"), (
            ["--tricks"], r"fused attention +prefill 1024( +[\d.]+ tok/s){2} +[\d.]+ \("), (
            ["--speculative"], "tokens for a step of the main model"):
        possible = flags != ["--speculative"] or package == "deepseek_v3"
        assert benchmark.main(["-m", PACKAGES[package], "-d", "cpu", "--rounds", "1", *flags]) == (0 if possible else 2)
        out, err = capsys.readouterr()
        assert not possible or (re.search(shown, out) and "GB of weights" not in out + err), out + err
        short = "has a context of 2048 tokens, so that lengths go up to 1024 instead of "
        assert (short in err) == (flags != ["--speculative"])
        assert ("MB of weights fit in a processor's cache" in err) == possible


def test_two_checkpoints_are_measured_side_by_side(monkeypatch, capsys, tmp_path):
    """As one in four bits beside the same in bfloat16."""
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(machine, "matrix_rate", lambda device: (1e9, torch.bfloat16))
    monkeypatch.setattr(machine, "BUSY", 1e9)
    monkeypatch.setattr(machine, "LOOK", 0)
    monkeypatch.setattr(compete, "Contender", InThisProcess)
    rounded = quantize_tiny(tmp_path / "rounded")
    out = tmp_path / "out.json"
    flags = ["-d", "cpu", "--rounds", "1", "--prefill", "9", "--decode", "9", "--json", str(out)]
    assert benchmark.main(["-m", str(rounded), "--against", "Qwen3-Tiny", *flags]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"decode 9 +[\d.]+ tok/s .* [\d.]+ tok/s +[\d.]+ \(", printed), printed
    assert json.loads(out.read_text())["results"]["start"].keys() == {"ours", "Qwen3-Tiny"}
    assert "of 8 greedy tokens are the same" in printed


def quantize_tiny(folder: Path) -> Path:
    assert import_module("scripts.quantize.__main__").main(["Qwen3-Tiny", "-o", str(folder)]) == 0
    return folder


def test_the_default_says_that_it_is_the_embedded_checkpoint(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    assert benchmark.main([]) == 2  # there is none
    assert "Qwen3-0.6B is not downloaded (`bash scripts/download_qwen3.sh` gets it): measuring Qwen3-Tiny\n" in (
        capsys.readouterr().err)


def test_patience_ends(monkeypatch, capsys):
    """On a machine that others use, as every desktop is, one wait is enough for the whole run."""
    monkeypatch.setattr(machine, "BUSY", -1e9)
    monkeypatch.setattr(machine, "LOOK", 0.01)
    patience, measured = compete.Patience(0.05), []
    for _ in range(20):
        patience.undisturbed(lambda: measured.append(1) or {}, [])
    assert len(measured) == 20 and patience.left == 0
    assert "in 20 of 20 measurements" in patience.summary()
    monkeypatch.setattr(machine, "BUSY", 1e9)
    assert patience.undisturbed(lambda: {"seconds": 1}, []) == {"seconds": 1}
    assert "in 20 of 21 measurements" in patience.summary()


def test_a_neighbour_is_noticed():
    assert not machine.Neighbours().cores() < 0
    if sys.platform == "linux":
        total, own = machine.used()
        assert total > own >= 0


@pytest.mark.parametrize("arguments, wrong", [
    (["--shape", "nothing"], "known are qwen3-0.6b"), (["--layers", "2"], "--layers cuts a --shape"),
    (["--shape", "qwen3-0.6b", "--layers", "99"], "the shape has 28"), (["-m", "nothing"], "no such file"),
    (["-m", "Qwen3-Tiny", "--prefill", "2048"], "--prefill 2048: expected 1 to 2047"),
    (["-m", "Qwen3-Tiny", "--decode", "9", "4096"], "--decode 4096: "),
    (["-m", "Qwen3-Tiny", "--json", "none/x.json"], "--json none/x.json: not a file in a folder that exists"),
    (["-m", "Qwen3-MoE-Tiny", "--compile", "-d", "cpu"], "--compile needs a GPU for qwen3_moe"),
    (["-m", "Qwen3-Tiny", "--compile", "--tricks"], "--compile goes with the usual measurement and with --plot only"),
    (["-m", "Qwen3-Tiny", "--against", "nowhere"], "--against nowhere: neither transformers nor a checkpoint"),
    (["-m", "Qwen3-Tiny", "--against", "DeepSeek-V3-Tiny"], "it is for deepseek_v3, the other one for qwen3"),
    (["-m", "Qwen3-Tiny", "--ranks", "1"], "--ranks 1: expected 2 or more"),
    (["-m", "Qwen3-Tiny", "--ranks", "3", "-d", "cpu"], "3 processes cannot share 6 query heads and 2 key heads"),
    (["-m", "Qwen3-Tiny", "--ranks", "2", "-d", "cuda:1"], "-d cuda:1 is one device, and 2 ranks want one each"),
    (["-m", "Qwen3-Tiny", "--ranks", "2", "--against", "transformers"], "--ranks compares with one process"),
    (["-m", "Qwen3-Tiny", "--ranks", "99", "-d", "cuda"], "--ranks 99: each has a GPU of its own"),
    (["--rounds", "0"], "at least one"), (["-m", "Qwen3-Tiny", "--speculative"], "is for deepseek_v3")])
def test_mistakes_are_one_sentence(monkeypatch, capsys, arguments, wrong):
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(machine, "matrix_rate", lambda device: (1e9, torch.bfloat16))
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert wrong in error and "Traceback" not in error and error.startswith("benchmark: ") and len(error) < 300


def test_torchrun_starts_no_second_benchmark(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert benchmark.main(["-m", "Qwen3-Tiny"]) == 2
    assert "--ranks N starts N processes with one model by itself" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_beside_one_process(monkeypatch, capsys, tmp_path):
    """A token takes two sums a layer, one for the embedding and one for the head."""
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(machine, "matrix_rate", lambda device: (1e9, torch.bfloat16))
    monkeypatch.setattr(machine, "BUSY", 1e9)
    out = tmp_path / "out.json"
    assert benchmark.main(["-m", "Qwen3-Tiny", "--ranks", "2", "-d", "cpu", "--rounds", "1", "--prefill", "9",
                           "--decode", "5", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"decode 5( +[\d,.]+ tok/s){2} +[\d.]+ \(.*\) +12 +[\d.]+ ms, +\d+%\n", printed), printed
    assert re.search(r"A sum of 0.6 kB, as of one token, takes [\d,]+ µs by itself \(gloo\)", printed), printed
    results = json.loads(out.read_text())["results"]
    for label in ("prefill 9", "decode 5"):
        (alone,), (two,) = (results[label][name] for name in ("1 process", "2 ranks"))
        assert "sums" not in alone and two["sums"] == 12 and 0 < two["in_sums"] < two["seconds"]


def test_the_published_shapes_are_listed(capsys):
    assert benchmark.main(["--shape", "list"]) == 0
    assert capsys.readouterr().out.split() == list(shapes.published())


@pytest.mark.slow
def test_it_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(machine, "matrix_rate", lambda device: (1e9, torch.bfloat16))
    monkeypatch.setattr(machine, "BUSY", 1e9)
    out = tmp_path / "out.json"
    flags = ["--rounds", "1", "--prefill", "9", "--decode", "5", "--json", str(out)]
    assert benchmark.main(["-m", "DeepSeek-V3-Tiny", *flags]) == 0
    printed = capsys.readouterr().out
    assert "prefill 9" in printed and "decode 5" in printed
    assert json.loads(out.read_text())["results"]["decode 5"]["ours"][0]["seconds"] > 0
    assert benchmark.main(["-m", "DeepSeek-V3-Tiny", "--rounds", "1", "--speculative"]) == 0
    assert "tokens for a step of the main model" in capsys.readouterr().out
