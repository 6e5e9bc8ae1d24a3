"""Damaged checkpoints by the thousand: each is loaded as the library would load it, or refused in one sentence.

A third each: the header of the weights (bytes, lengths, places); every field of config, index and generation_config
with wrong values and types; the tokenizer's files, and truncation. `uv run pytest -m slow tests/test_mutations.py` runs
more.
"""

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.packages import PACKAGES, module
from tests.seeded import deepseek_v3_config, qwen3_config, qwen3_moe_config, write_checkpoint

TINY = Path(__file__).parents[1] / "checkpoints"
CONFIGS = {"qwen3": qwen3_config, "qwen3_moe": qwen3_moe_config, "deepseek_v3": deepseek_v3_config}
VALUES = [None, True, False, 0, -1, 1, 2.5, 10**30, float("nan"), float("inf"), "", "x" * 9000, "7", [], [1, "a"], {},
          {"a": {"b": []}}, "a\nb", "\ud800", [None] * 5000, 128, "yarn", [128, 128], 1e-300]


@pytest.fixture(params=PACKAGES)
def package(request) -> str:
    return request.param


def attempt(package: str, folder: Path, engine: bool = True) -> bool:
    """Whether the checkpoint runs; a refusal must be one short sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer = module(package, "tokenizer").Tokenizer.from_checkpoint(folder)
            tokenizer.decode(tokenizer.encode("Hello <|im_end|>"))
            if tokenizer.thinking is not None:
                tokenizer.chat([{"role": "user", "content": "Hi"}])
            model = module(package, "weights").load_model(folder, engine=engine)
            assert not any(p.is_meta for p in model.parameters())
            list(module(package, "generate").generate(model, [1, 2, 3], max_new_tokens=2))
        return True
    except (ValueError, FileNotFoundError) as error:
        said = str(error).replace(str(folder), "")
        assert type(error) in (ValueError, FileNotFoundError) and len(said) < 300 and "\n" not in said, said
        return False


def starting_point(folder: Path, package: str) -> Path:
    shutil.copytree(TINY / PACKAGES[package], folder, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    vocabulary = json.loads((TINY / PACKAGES[package] / "config.json").read_text())["vocab_size"]
    write_checkpoint(folder, CONFIGS[package](vocab_size=vocabulary, torch_dtype="bfloat16"), torch.bfloat16, std=0.02)
    if package == "qwen3_moe":  # in two files with an index
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
        for file in set(where.values()):
            save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def mutate_header(data: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    kind = chance.randrange(6)
    if kind == 0:  # bytes
        out = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            out[chance.randrange(8 + length)] = chance.randrange(256)
        return bytes(out)
    if kind == 1:  # the header's length
        wrong = chance.choice([0, 1, length - 1, length + 1, length * 2, 2**63, 2**64 - 1, len(data)])
        return wrong.to_bytes(8, "little") + data[8:]
    if kind == 2:  # bytes in the middle once more, or gone, as after a wrong resume
        a, b = sorted(chance.randrange(8 + length, len(data)) for _ in range(2))
        return data[:b] + data[a:] if chance.random() < 0.5 else data[:a] + data[b:]
    header = json.loads(data[8:8 + length])
    names = [key for key in header if key != "__metadata__"]
    name = chance.choice(names)
    entry = header[name]
    if kind == 3:  # a place
        first, last = entry["data_offsets"]
        other = header[chance.choice(names)]["data_offsets"]
        entry["data_offsets"] = chance.choice([
            other, [0, 0], [last, first], [first + 2, last + 2], [-2, 2], [0.5, 2], "x", None, [1], [0, 2**64],
            [0, 10**30]])
    elif kind == 4:  # a shape or type
        entry[chance.choice(["shape", "dtype"])] = chance.choice([
            [], [0], [2**62, 4], [-1, -2], "F32", "F64", "I8", "BOOL", "F8_E8M0", "x", None, [1.5],
            entry["shape"][::-1], 5, ["a"]])
    else:  # a name
        new = chance.choice(["x", "", "a\nb", name + ".inv_freq", "lm_head.weight", "\u2028" * 200, "__metadata__"])
        header[new] = header.pop(name)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length:]


def mutate_fields(values: dict, chance: random.Random) -> dict:
    """One field somewhere, wrong, missing or new."""
    values = json.loads(json.dumps(values))
    place = values
    while True:
        key = chance.choice(list(place) or ["new"])
        if isinstance(place.get(key), dict) and place[key] and chance.random() < 0.7:
            place = place[key]
            continue
        if chance.random() < 0.1:
            place.pop(key, None)
        else:
            place[key if chance.random() < 0.95 else "surprise"] = chance.choice(VALUES)
        return values


def mutate_text(data: bytes, chance: random.Random) -> bytes:
    kind = chance.randrange(3)
    if kind == 0:
        return data[:chance.randrange(len(data))]
    if kind == 1:
        out = bytearray(data)
        for _ in range(chance.randrange(1, 9)):
            out[chance.randrange(len(out))] = chance.randrange(256)
        return bytes(out)
    try:
        return json.dumps(mutate_fields(json.loads(data), chance)).encode()
    except (ValueError, UnicodeDecodeError):
        return b""


def library_reads(folder: Path) -> bool:
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                list(file.keys())
        return True
    except Exception:  # noqa: BLE001  whatever it raises
        return False


def run(package: str, folder: Path, count: int, seed: int) -> int:
    chance, loaded = random.Random(seed), 0
    start = starting_point(folder / "start", package)
    weights = sorted(path.name for path in start.glob("*.safetensors"))
    fields = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    fields = [name for name in fields if (start / name).exists()]
    texts = ["tokenizer.json", "tokenizer_config.json"]
    for i in range(count):
        kind, name = i % 3, chance.choice([weights, fields, texts][i % 3])
        data = (start / name).read_bytes()
        if kind == 0:
            changed = mutate_header(data, chance) if chance.random() < 0.9 else data[:chance.randrange(len(data))]
        elif kind == 1:
            changed = json.dumps(mutate_fields(json.loads(data), chance)).encode()
        else:
            changed = mutate_text(data, chance)
        (start / name).write_bytes(changed)
        try:
            if attempt(package, start, engine=i // 3 % 2 == 0):  # the lesson alone refuses as well
                loaded += 1
                assert library_reads(start)
        except BaseException:
            shutil.copytree(start, folder / "failed", dirs_exist_ok=True)
            print(f"mutation {i} of {name}, seed {seed}")
            raise
        finally:
            (start / name).write_bytes(data)
    return loaded


def test_a_few(tmp_path, package):
    assert 0 < run(package, tmp_path, 60, seed=1) < 60


@pytest.mark.slow
def test_many(tmp_path, package):
    assert 0 < run(package, tmp_path, 500, seed=2) < 500
