"""Loading: nothing copied, one file or many, tied or not, FP8, and one clear sentence for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen3.engine.safetensors_reader import CheckpointFiles
from qwen3.generate import generate
from qwen3.weights import bytes_in_memory, load_model
from tests.seeded import PROMPT, qwen3_config, qwen3_shapes, seeded_tensor, write_checkpoint

UNTIED = qwen3_config(tie_word_embeddings=False)
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "made", UNTIED)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def split(folder: Path) -> dict[str, str]:
    """Cut the checkpoint into three files and an index; return the weight map."""
    tensors, names = tensors_of(folder), sorted(tensors_of(folder))
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_every_tensor_arrives_under_its_own_name(folder):
    model = load_model(folder)
    stored = load_file(folder / "model.safetensors")
    assert not model.training and set(model.state_dict()) == set(stored)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name])


def test_many_files_are_the_same_as_one(folder):
    one = load_model(folder)(torch.tensor([PROMPT]))
    split(folder)
    calls = []
    assert torch.equal(load_model(folder, progress=lambda *done: calls.append(done))(torch.tensor([PROMPT])), one)
    assert calls[-1][0] == calls[-1][1] == len(calls)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.float16])
def test_another_type_converts_everything(folder, dtype):
    model = load_model(folder, dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted} == {model(torch.tensor([PROMPT])).dtype}


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    """Qwen3-0.6B and 1.7B store the copy, 4B does not; facts: their published files."""
    config = qwen3_config()
    plain = write_checkpoint(tmp_path / "plain", config)
    embedding = tensors_of(plain)["model.embed_tokens.weight"]
    stored = write_checkpoint(tmp_path / "stored", config, **{"lm_head.weight": embedding})
    ids = torch.tensor([PROMPT])
    assert torch.equal(load_model(plain)(ids), load_model(stored)(ids))
    assert bytes_in_memory(plain) == bytes_in_memory(stored)


@pytest.mark.parametrize("row", [0, 77, 130])
def test_another_head_than_the_tied_one_is_the_head(tmp_path, row):
    """As in transformers 5.24; tying it moves logits by 0.36 of the largest. One row suffices: a new token's."""
    embedding = tensors_of(write_checkpoint(tmp_path / "tied", qwen3_config()))["model.embed_tokens.weight"]
    head = embedding.clone()
    head[row] += 1
    other = load_model(write_checkpoint(tmp_path / "other", qwen3_config(), **{"lm_head.weight": head}))
    untied = load_model(write_checkpoint(tmp_path / "untied", UNTIED, **{"lm_head.weight": head}))
    assert torch.equal(other(torch.tensor([PROMPT])), untied(torch.tensor([PROMPT])))
    assert "another lm_head.weight: that one is used" in other.config.notes[0] and not untied.config.notes


def test_the_bytes_are_known_before_loading(folder):
    count = sum(tensor.numel() for tensor in tensors_of(folder).values())
    assert bytes_in_memory(folder) == 4 * count and bytes_in_memory(folder, "bfloat16") == 2 * count
    assert bytes_in_memory(folder) == sum(p.nbytes for p in load_model(folder).parameters())


def test_an_unknown_type_is_refused(folder):
    with pytest.raises(ValueError, match="dtype 'int3' is not known; choose one of bfloat16"):
        load_model(folder, dtype="int3")


# What is wrong with a folder, and what is said of it

def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    merged = {name: tensor for name, tensor in (tensors_of(folder) | tensors).items() if tensor is not None}
    save_file(merged, folder / "model.safetensors")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def point_outside(folder: Path, target: str) -> None:
    weight_map = split(folder)
    index = {"weight_map": weight_map | {Q_PROJ: target}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def split_name(folder: Path, tensor: str) -> str:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def add_to(shard: Path, folder: Path) -> None:
    """A tensor of another shard, once more."""
    other = next(path for path in folder.glob("*.safetensors") if path != shard)
    name, tensor = next(iter(load_file(other).items()))
    save_file({name: tensor * 0} | load_file(shard), shard)


def patch_header(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])


def move(folder: Path, **entry: list) -> None:
    """Say of a tensor that it is elsewhere, or of another shape."""
    patch_header(folder, lambda header: header[Q_PROJ].update(entry))


def ask_for(folder: Path, **changes: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


WRONG = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "made: no weights in it"),
    "pickles": (only_pickles, r"only pickled weights \(pytorch_model.bin\).*never read"),
    "shard missing": (lambda f: (split(f), (f / "model-00002-of-00003.safetensors").unlink()),
                      "model-00002-of-00003.safetensors: this part of the checkpoint is missing"),
    "shard truncated": (lambda f: (split(f), cut(f / "model-00003-of-00003.safetensors", -100)),
                        "model-00003-of-00003.safetensors: truncated or damaged"),
    "truncated": (lambda f: cut(f / "model.safetensors", -8), "model.safetensors: truncated or damaged"),
    "cut in the header": (lambda f: cut(f / "model.safetensors", 100), "model.safetensors: truncated or damaged"),
    "empty file": (lambda f: cut(f / "model.safetensors", 0), "model.safetensors: truncated or damaged"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"<html>" * 99), "truncated or damaged"),
    "tensor missing": (lambda f: change(f, **{Q_PROJ: None}), f"{Q_PROJ} is missing from the checkpoint"),
    "tensor of a shard missing": (lambda f: save_file({"x": torch.ones(1)}, f / split(f)[Q_PROJ]),
                                  "is missing, though model.safetensors.index.json says that it is here"),
    "superfluous tensor": (lambda f: change(f, extra=torch.ones(2)),
                           "extra is in the checkpoint, but the config has no place"),
    "bias": (lambda f: change(f, **{Q_PROJ.replace("weight", "bias"): torch.ones(60)}),
             "q_proj.bias is in the checkpoint"),
    "wrong shape": (lambda f: change(f, **{Q_PROJ: torch.ones(61, 40)}),
                    r"q_proj.weight has shape \(61, 40\), the config asks for \(60, 40\)"),
    "whole numbers": (lambda f: change(f, **{Q_PROJ: torch.ones(60, 40, dtype=torch.int32)}), "stored as I32"),
    "unannounced FP8": (lambda f: change(f, **{Q_PROJ: torch.ones(60, 40).to(torch.float8_e4m3fn)}),
                        "FP8, which config.json"),
    "index outside": (lambda f: point_outside(f, "../other.safetensors"),
                      "points outside the folder, to '../other.safetensors'"),
    "index absolute": (lambda f: point_outside(f, "/etc/passwd"), "points outside the folder"),
    "index to windows": (lambda f: point_outside(f, "..\\x"), "points outside the folder"),
    "index to the folder above": (lambda f: point_outside(f, ".."), "points outside the folder"),
    "twice": (lambda f: (split(f), add_to(f / split_name(f, Q_PROJ), f)),
              r" is in it and in model-0000\d-of-00003.safetensors too"),
    "places that overlap the end": (lambda f: move(f, data_offsets=[0, 10**9]),
                                    "q_proj.weight is not where the header says"),
    "place of another size": (lambda f: move(f, shape=[60, 41]), "is not where the header says"),
    "a shape of fractions": (lambda f: move(f, shape=[60.0, 40.0]), "is not where the header says"),
    "a place of fractions": (lambda f: move(f, data_offsets=[0.0, 9600.0]), "is not where the header says"),
    "layers without end": (lambda f: ask_for(f, num_hidden_layers=10**9),
                           "config.json asks for 1000000000 layers, the files hold"),
    "header is a list": (lambda f: (f / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"),
                         "truncated or damaged"),
    "index empty": (lambda f: (split(f), (f / "model.safetensors.index.json").write_text("{}")), "has no weight_map"),
    "index no JSON": (lambda f: (split(f), (f / "model.safetensors.index.json").write_text("{")),
                      "index.json: not valid JSON"),
}


@pytest.mark.parametrize("damage, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and str(folder.name) in str(error.value)


def test_a_tensor_may_begin_anywhere(folder):
    """The library pads headers so that numbers are aligned; others may not."""
    before = load_model(folder)(torch.tensor([PROMPT]))
    patch_header(folder, lambda header: header.setdefault("__metadata__", {}).update(odd="x"))
    data = (folder / "model.safetensors").read_bytes()
    if int.from_bytes(data[:8], "little") % 4 == 0:
        patch_header(folder, lambda header: header["__metadata__"].update(odd="xx"))
    assert int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little") % 4
    assert torch.equal(load_model(folder)(torch.tensor([PROMPT])), before)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's rule")
def test_a_file_larger_than_memory_is_mapped(tmp_path):
    """Linux refuses a private mapping larger than memory and swap, unless it is told that nothing need be reserved."""
    numbers = {line.split()[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()}
    size = numbers["MemTotal:"] + numbers["SwapTotal:"] + (1 << 30)
    path = tmp_path / "model.safetensors"
    header = json.dumps({"big": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size // 2 * 2]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size // 2 * 2)  # a hole: it takes no place on the disk
    big = CheckpointFiles(tmp_path).read("big")
    assert big.shape == (size // 2,) and big[-1] == 0
    big[0] = 1  # private: the file stays as it is
    assert CheckpointFiles(tmp_path).read("big")[0] == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything is readable here")
def test_a_file_that_may_not_be_read_is_named(folder):
    for name in ("model.safetensors", "config.json"):
        (folder / name).chmod(0)
        with pytest.raises(ValueError, match=f"{name}: cannot be read"):
            load_model(folder)
        (folder / name).chmod(0o644)


def test_a_tied_head_in_fp8_is_no_copy(tmp_path):
    head = torch.ones(131, 40).to(torch.float8_e4m3fn)
    message = "lm_head.weight is FP8, which config.json's quantization_config does not announce"
    with pytest.raises(ValueError, match=message):
        load_model(write_checkpoint(tmp_path, qwen3_config(), **{"lm_head.weight": head}))


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_model(tmp_path / "nowhere")


def test_a_pickle_beside_the_weights_is_not_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_model(folder)


# FP8

def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 128 x 128, each divided by its largest value over 448, as the releases are made."""
    rows, columns = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
    scale, out = torch.ones(rows, columns), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for r in range(rows):
        for c in range(columns):
            block = weight[r * 128:(r + 1) * 128, c * 128:(c + 1) * 128].float()
            scale[r, c] = block.abs().max() / 448
            out[r * 128:(r + 1) * 128, c * 128:(c + 1) * 128] = (block / scale[r, c]).to(torch.float8_e4m3fn)
    return out, scale


def fp8_checkpoint(folder: Path, D: int = 200, F: int = 300, dtype: str = "bfloat16") -> Path:
    """Ragged blocks both ways, unless asked for others: 200 and 300 are not multiples of 128."""
    config = qwen3_config(hidden_size=D, intermediate_size=F, torch_dtype=dtype, quantization_config=FP8)
    tensors = {}
    for name, shape in qwen3_shapes(config).items():
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(seeded_tensor(name, shape, 0.1))
    return write_checkpoint(folder, config, getattr(torch, dtype), **tensors)


def test_fp8_stays_fp8_and_gives_the_tokens_of_the_expanded_weights(tmp_path):
    folder = fp8_checkpoint(tmp_path)
    kept, expanded = load_model(folder), load_model(folder, dtype="bfloat16")
    projections = [p for name, p in kept.named_parameters() if name.endswith("_proj.weight")]
    assert len(projections) == 21 and {p.dtype for p in projections} == {torch.float8_e4m3fn}
    assert {p.dtype for p in expanded.parameters()} == {torch.bfloat16}
    ids = torch.tensor([PROMPT])
    assert torch.equal(kept(ids), expanded(ids))
    tokens = list(generate(kept, PROMPT, max_new_tokens=12))
    assert tokens == list(generate(expanded, PROMPT, max_new_tokens=12)) and len(set(tokens)) > 1
    assert bytes_in_memory(folder) == sum(p.nbytes for p in kept.parameters())
    assert bytes_in_memory(folder, "bfloat16") == sum(p.nbytes for p in expanded.parameters())


def test_fp8_is_the_reference_on_weights_expanded_by_hand(tmp_path):
    folder = fp8_checkpoint(tmp_path / "fp8")
    tensors = tensors_of(folder)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scale, weight = tensors.pop(name), tensors[name.removesuffix("_scale_inv")]
        out = weight.float()
        for r in range(scale.shape[0]):
            for c in range(scale.shape[1]):
                out[r * 128:(r + 1) * 128, c * 128:(c + 1) * 128] *= scale[r, c]
        tensors[name.removesuffix("_scale_inv")] = out.bfloat16()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    by_hand = write_checkpoint(tmp_path / "hand", config, torch.bfloat16, **tensors)
    ids = torch.tensor([PROMPT])
    assert torch.equal(load_model(folder)(ids), load_model(by_hand)(ids))


def test_an_fp8_scale_that_is_missing_or_misshapen_is_named(tmp_path):
    folder = fp8_checkpoint(tmp_path)
    change(folder, **{f"{Q_PROJ}_scale_inv": None})
    with pytest.raises(ValueError, match="q_proj.weight_scale_inv is missing"):
        load_model(folder)
    change(folder, **{f"{Q_PROJ}_scale_inv": torch.ones(2, 2)})
    message = r"scale_inv has shape \(2, 2\), no scale for each block, row or tensor of \(60, 200\)"
    with pytest.raises(ValueError, match=message):
        load_model(folder)


MEASURE = """
import sys
from pathlib import Path
import torch
from qwen3.weights import load_model

def anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

for engine in (True, False):
    # What the libraries themselves allocate at first use; with a small model, so that freed memory hides nothing.
    load_model(sys.argv[2], engine=engine)
    before = anonymous()
    model = load_model(sys.argv[1], engine=engine)
    print(anonymous() - before)
"""


@pytest.mark.ahead
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_loading_copies_nothing(tmp_path):
    config = qwen3_config(vocab_size=20000, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
                          torch_dtype="bfloat16")
    folder = write_checkpoint(tmp_path / "made", config, torch.bfloat16)
    small = write_checkpoint(tmp_path / "small", qwen3_config())
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder), str(small)], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parents[2])
    grown = [int(line) for line in done.stdout.splitlines()]
    assert len(grown) == 2 and max(grown) < 0.05 * (folder / "model.safetensors").stat().st_size
