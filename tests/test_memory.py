"""Does it fit? What is advised where it does not, and what becomes of FP8 on a CPU."""

import json
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts import download
from tests.packages import PACKAGES, module
from tests.seeded import shapes_of

HERE = Path(__file__).parent
CPU, GPU, APPLE = (torch.device(name) for name in ("cpu", "cuda", "mps"))


# Fewer bits

def test_the_releases_in_fewer_bits_are_those_that_are_downloaded():
    releases = module("qwen3", "engine.releases")
    known = {name for names in download.GIGABYTES.values() for name in names if name.endswith(releases.FORMATS)}
    assert known == set(releases.PUBLISHED)
    # Published beside the release in 16 bits, by whoever published that.
    every = {name for names in download.GIGABYTES.values() for name in names}
    assert {re.sub("|".join(releases.FORMATS), "", name) for name in known} <= every


def refusal(folder: Path, monkeypatch, package: str, name: str, free: float, device=CPU, dtype=None) -> str:
    """What a machine with so many GB says of a published shape."""
    entry = json.loads((HERE / package / "published_configs.json").read_text())[name]["config"]
    if package == "qwen3_moe":
        entry |= {"num_hidden_layers": 6, "max_window_layers": 6}  # of 48, to be quick
    folder /= name
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(entry))
    info, sizes = module(package, "engine.safetensors_reader").TensorInfo, module(package, "engine.sizes")
    tensors = {name: info(folder, shape, torch.bfloat16, 0, 0) for name, shape in shapes_of(entry).items()}
    files = SimpleNamespace(tensors=tensors, directory=folder)
    config = module(package, "config").Config.from_checkpoint(folder)
    monkeypatch.setattr(sizes, "read_checkpoint", lambda directory: (config, files))
    monkeypatch.setattr(sizes, "free_memory", lambda device: int(free * 1e9))
    with pytest.raises(ValueError) as error:
        sizes.check_memory(folder, device, dtype, 4110, 600_000_000)
    assert len(str(error.value)) < 300 and "GB for weights and 0.6 GB for the cache of 4,110 tokens" in str(error.value)
    return str(error.value).partition("; ")[2]


def test_what_does_not_fit_in_bfloat16_is_refused_with_what_does(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    refused = lambda *arguments: refusal(folder, monkeypatch, *arguments)  # noqa: E731
    get, make = "`bash scripts/download_{}.sh {}` gets it in {} bits, which fit ({} GB)".format, (
        "`uv run python -m scripts.quantize {}` rounds it to 4 bits, which fit ({} GB)").format
    assert refused("qwen3", "Qwen3-8B", 8) == get("qwen3", "Qwen3-8B-AWQ", 4, "6.4")
    assert refused("qwen3", "Qwen3-8B", 8, GPU) == get("qwen3", "Qwen3-8B-AWQ", 4, "6.4")
    assert refused("qwen3", "Qwen3-0.6B", 1.5) == get("qwen3", "Qwen3-0.6B-GPTQ-Int8", 8, "0.8")
    assert refused("qwen3", "Qwen3-8B-Base", 8) == make("Qwen3-8B-Base", "6.4")
    assert refused("qwen3", "Qwen3-4B-Thinking-2507", 4) == make("Qwen3-4B-Thinking-2507", "2.8")
    smaller = "choose a smaller checkpoint, another device or a smaller -n"
    assert refused("qwen3", "Qwen3-8B", 6) == refused("qwen3", "Qwen3-8B", 0.1) == smaller
    assert refused("qwen3", "Qwen3-8B", 8, APPLE) == smaller  # where it would be expanded
    # On the CPU what one token uses; on a GPU everything, and experts could stay in the file on the CPU.
    four_bits = get("qwen3_moe", "Qwen3-30B-A3B-GPTQ-Int4", 4, "{}").format
    assert refused("qwen3_moe", "Qwen3-30B-A3B", 2.1) == four_bits("1.4")
    assert refused("qwen3_moe", "Qwen3-30B-A3B", 8, GPU) == four_bits("3.4")
    assert "`-d cpu` without --dtype" in refused("qwen3_moe", "Qwen3-30B-A3B", 3, GPU)
    elsewhere = tmp_path / "models"
    elsewhere.mkdir()
    assert refusal(elsewhere, monkeypatch, "qwen3", "Qwen3-8B-Base", 8) == make(elsewhere / "Qwen3-8B-Base", "6.4")


# FP8 on a CPU

@pytest.fixture(params=PACKAGES)
def fp8(request, tmp_path, monkeypatch) -> SimpleNamespace:
    """A checkpoint in FP8 with its sizes, on a machine with `free` bytes."""
    folder = import_module(f"tests.{request.param}.test_weights").fp8_checkpoint(tmp_path)
    sizes = module(request.param, "engine.sizes")
    found = SimpleNamespace(package=request.param, folder=folder, sizes=sizes, free=None,
                            kept=sizes.bytes_in_memory(folder), expanded=sizes.bytes_in_memory(folder, "bfloat16"))
    monkeypatch.setattr(sizes, "free_memory", lambda device: found.free)
    return found


def test_fp8_is_expanded_on_a_cpu_that_has_room_for_all_of_it(fp8):
    def chosen(free: float | None, device=CPU, asked=None, processes=1) -> str | None:
        fp8.free = free and int(free)
        return fp8.sizes.keep_or_expand(fp8.folder, device, asked, 1000, processes)[0]

    assert fp8.kept < 0.7 * fp8.expanded
    room = (fp8.expanded + 1000) * 10 / 9
    assert [chosen(free) for free in (room + 2, room - 2, None)] == ["bfloat16", None, None]
    room = (3 * fp8.expanded + 1000) * 10 / 9  # replicas, each with its own
    assert [chosen(free, processes=3) for free in (room + 2, room - 2)] == ["bfloat16", None]
    assert [chosen(1e12, asked=asked) for asked in ("fp8", "float32", "int4")] == [None, "float32", "int4"]
    assert [chosen(1e12, GPU, asked) for asked in (None, "fp8", "bfloat16")] == [None, None, "bfloat16"]
    with pytest.raises(ValueError, match="Apple's GPUs have no FP8; leave out --dtype fp8, or give -d cpu"):
        chosen(1e12, APPLE, "fp8")
    with pytest.raises(ValueError, match="Tiny has no FP8 weights that --dtype fp8 could keep; leave it out"):
        name = {"qwen3": "Qwen3", "qwen3_moe": "Qwen3-MoE", "deepseek_v3": "DeepSeek-V3"}[fp8.package]
        fp8.sizes.keep_or_expand(HERE.parent / f"checkpoints/{name}-Tiny", CPU, "fp8", 0)


def test_replicas_share_the_file_of_fp8_that_is_kept_and_have_an_expanded_copy_each(fp8, capsys):
    Conversation, config = (module(fp8.package, name) for name in ("engine.conversation", "config"))
    one = SimpleNamespace(arguments=SimpleNamespace(device="cpu", dtype=None), folder=fp8.folder, name="X",
                          config=config.Config.from_checkpoint(fp8.folder))
    expanded = r"bfloat16 on cpu \(expanded from FP8, which a CPU is slow at; --dtype fp8 keeps it: \d\.\d MB\)"
    kept = r"FP8 on cpu \(slow there; in bfloat16 it would take \d\.\d MB, more than there is room for\)"
    for free, dtype, said in ((fp8.expanded * 2.4, "bfloat16", expanded), (fp8.expanded * 1.9, None, kept)):
        fp8.free = int(free)
        assert Conversation.Conversation.find_room(one, 2, processes=2) == (CPU, dtype)
        assert re.search(rf"X: \d\.\d MB of weights in {said}, ", capsys.readouterr().err)


# Weights of four bits

def test_what_is_rounded_here_takes_its_words_and_what_is_packed_of_them(monkeypatch):
    sizes, folder = module("qwen3", "engine.sizes"), HERE.parent / "checkpoints/Qwen3-Tiny"
    model = module("qwen3", "weights").load_model(folder, dtype="int4")
    parts = [part for part in model.modules() if getattr(part, "packed", None)]
    held = sum(weight.nbytes for weight in model.parameters()) + sum(part.packed.values.nbytes for part in parts)
    for free, fits in ((int(1.3 * held), True), (int(0.95 * held), False)):
        monkeypatch.setattr(sizes, "free_memory", lambda device: free)
        if fits:
            assert sizes.check_memory(folder, CPU, "int4", 1, 0)
            continue
        with pytest.raises(ValueError, match="for weights and"):
            sizes.check_memory(folder, CPU, "int4", 1, 0)


def test_replicas_pack_a_copy_each(tmp_path, monkeypatch):
    assert import_module("scripts.quantize.__main__").main(["Qwen3-Tiny", "-o", str(tmp_path / "made")]) == 0
    conversation, folder = module("qwen3", "engine.conversation"), tmp_path / "made"
    config, caches = module("qwen3", "config").Config.from_checkpoint(folder), []
    monkeypatch.setattr(conversation, "check_memory", lambda *arguments: caches.append(arguments[-1]) or "")
    arguments = SimpleNamespace(device="cpu", dtype=None)
    one = SimpleNamespace(arguments=arguments, config=config, folder=folder, name="made")
    for processes in (1, 4):
        conversation.Conversation.find_room(one, 0, processes)
    assert caches == [0, 3 * module("qwen3", "weights").bytes_in_memory(folder)]
