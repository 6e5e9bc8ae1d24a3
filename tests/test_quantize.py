"""scripts.quantize: what it writes, how it goes on after an interruption, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts.quantize import __main__ as quantize
from tests.packages import PACKAGES, module
from tests.packed import CONFIGS, WIDTHS
from tests.seeded import shapes_of, write_checkpoint
from tests.test_releases import IDS, logits

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=PACKAGES)
def package(request) -> str:
    return request.param


def source_of(folder: Path, package: str, dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
    config = CONFIGS[package](**WIDTHS[package] | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes)
    return write_checkpoint(folder / "source", config, dtype)


def run(source: Path, output: Path, *flags: str) -> int:
    return quantize.main([str(source), "-o", str(output), *flags])


@pytest.mark.parametrize("flags", [pytest.param((), marks=pytest.mark.slow), ("--bits", "8"),
                                   ("--group", "16", "--head")])
def test_what_is_written_is_the_model_rounded_in_memory(tmp_path, package, capsys, flags):
    source, output = source_of(tmp_path, package, tie_word_embeddings=package == "qwen3"), tmp_path / "made"
    assert run(source, output, *flags) == 0
    assert f"{output}: " in capsys.readouterr().out
    rounding, load_model = module(package, "engine.rounding"), module(package, "weights").load_model
    bits, group = (8, None) if "8" in flags else (4, 16 if flags else 32)
    expected = load_model(source, dtype="float32")
    for name, weight in expected.named_parameters():
        if "_proj" in name or (name == "lm_head.weight" and "--head" in flags):
            q, scale = rounding.round_matrix(weight, bits, group or weight.shape[1])
            weight.data = q * scale.float().repeat_interleave(group or weight.shape[1], 1)
    if "--head" in flags and package == "qwen3":  # the embedding stays, and is no longer the head
        head = load_model(source, dtype="float32").lm_head.weight
        q, scale = rounding.round_matrix(head, 4, 16)
        expected.lm_head.weight = torch.nn.Parameter(q * scale.float().repeat_interleave(16, 1))
        expected.model.embed_tokens.weight = head
    model = load_model(output)
    assert model.config.quantization == "compressed-tensors" and not list(output.glob("*.part"))
    with torch.inference_mode():
        wanted = expected(IDS)
        assert (load_model(output, dtype="float32")(IDS) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert (model(IDS) - wanted).abs().mean() <= 0.1 * wanted.abs().mean()  # a token may be routed elsewhere
    stored = load_file(output / "model.safetensors")
    kept = load_file(source / "model.safetensors")
    assert all(torch.equal(stored[name], kept[name]) for name in kept.keys() & stored.keys())
    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] == (package == "qwen3" and "--head" not in flags)
    ignored = config["quantization_config"]["ignore"]
    assert ("lm_head" in ignored) == ("--head" not in flags)
    assert package == "qwen3" or "re:.*[.]mlp[.]gate$" in ignored


def test_fp8_becomes_four_bits(tmp_path, package):
    source = source_of(tmp_path, package)
    quantised = module(package, "engine.quantized")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in list(tensors.items()):
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = (tensor * 8).to(quantised.FP8), torch.full((1, 1), 0.125)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": fp8}))
    assert run(source, tmp_path / "made") == 0
    name = "model.layers.0.self_attn.o_proj"
    weight = tensors[f"{name}.weight"].float() * 0.125
    model = module(package, "weights").load_model(tmp_path / "made")
    q, scale = module(package, "engine.rounding").round_matrix(weight, 4, 32)
    assert torch.equal(model.get_submodule(name).integers().values.short() - 8, q.short())
    assert quantised.FP8 not in {tensor.dtype for tensor in load_file(tmp_path / "made/model.safetensors").values()}


def test_it_goes_on_after_an_interruption(tmp_path, monkeypatch, capsys):
    source, whole, output = source_of(tmp_path, "qwen3"), tmp_path / "whole", tmp_path / "made"
    monkeypatch.setattr(quantize, "SHARD", 15_000)
    assert run(source, whole) == 0
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(files) > 3 and (whole / "model.safetensors.index.json").is_file()
    written, old = [], quantize.Quantizer.written

    def interrupted(self, name: str) -> dict:
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append(name)
        return old(self, name)

    monkeypatch.setattr(quantize.Quantizer, "written", interrupted)
    assert run(source, output) == 130 and "run it again and it goes on" in capsys.readouterr().err
    there = {path.name: path.stat().st_mtime_ns for path in output.glob("*.safetensors")}
    assert 0 < len(there) < len(files) and not (output / "config.json").exists()
    again = []
    monkeypatch.setattr(quantize.Quantizer, "written", lambda self, name: again.append(name) or old(self, name))
    assert run(source, output) == 0
    assert len(again) < len(written) + len(again) and all(
        (output / name).stat().st_mtime_ns == time for name, time in there.items())
    for name in [*files, "config.json", "model.safetensors.index.json"]:
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert torch.equal(logits("qwen3", output), logits("qwen3", whole))
    again.clear()
    assert run(source, output) == 0 and not again  # nothing is left to do


def test_no_other_folder_is_touched(tmp_path, capsys):
    source, foreign = source_of(tmp_path, "qwen3"), tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("dear")
    made = tmp_path / "made"
    assert run(source, made) == 0
    for words, message in {
            (str(source), "-o", str(foreign)): "is there, and not from this program",
            (str(source), "-o", str(made), "--bits", "8"): "was begun from another checkpoint or with other flags",
            (str(source), "-o", str(source)): "lies in the folder that is read",
            (str(source), "-o", str(source / "inside")): "lies in the folder that is read",
            (str(made), "-o", str(tmp_path / "twice")): "its weights are integers already (compressed-tensors)",
            (str(source), "--group", "12"): "--group 12: expected a multiple of 8",
            ("nowhere",): "nowhere: neither a folder nor a name under checkpoints/",
            (str(foreign),): "config.json: no such file"}.items():
        assert quantize.main(list(words)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1 and len(error) < 500
    assert [path.name for path in foreign.iterdir()] == ["letter.txt"] and not (source / "quantize.json").exists()
    assert not (tmp_path / "twice").exists()


def test_experts_of_a_layer_are_rounded_all_or_none(tmp_path):
    """transformers reads them in one format only."""
    source = source_of(tmp_path, "qwen3_moe", moe_intermediate_size=24)
    assert run(source, tmp_path / "made") == 0
    names = load_file(tmp_path / "made/model.safetensors")
    assert not any("weight_packed" in name for name in names if ".experts." in name)
    assert any("weight_packed" in name for name in names)
    assert logits("qwen3_moe", tmp_path / "made").isfinite().all()


TINY = {"qwen3": "Qwen3-Tiny", "qwen3_moe": "Qwen3-MoE-Tiny", "deepseek_v3": "DeepSeek-V3-Tiny"}


@pytest.mark.parametrize("package, bits", [
    pytest.param(package, bits, marks=() if (package, bits) == ("qwen3", 4) else pytest.mark.slow)
    for package in PACKAGES for bits in (4, 8)])
def test_the_embedded_models_still_add(tmp_path, package, bits, capfd):
    output = tmp_path / "made"
    assert run(ROOT / "checkpoints" / TINY[package], output, "--bits", str(bits)) == 0
    assert sorted(path.name for path in output.iterdir() if path.name != quantize.MARK) == sorted(
        path.name for path in (ROOT / "checkpoints" / TINY[package]).iterdir())
    assert module(package, "main").main(["-m", str(output), "-p", "What is 347 + 586?", "-d", "cpu"]) == 0
    out, err = capfd.readouterr()
    assert out.strip().endswith("933") or "933" in out, out
    assert "of weights in compressed-tensors on cpu" in err
