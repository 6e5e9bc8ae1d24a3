"""The lesson without the engine's parts: load_model(engine=False) and --plain.

That it gives the logits of transformers and the tokens of the engine stands in test_model.py.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.packages import PACKAGES, module, runs_engine
from tests.qwen3.test_weights import FP8, quantise
from tests.seeded import deepseek_v3_config, qwen3_config, qwen3_moe_config, write_checkpoint
from tests.test_generate import PROMPT, PROMPTS, made, slowly

HERE = Path(__file__).parent
CONFIGS = {"qwen3": qwen3_config, "qwen3_moe": qwen3_moe_config, "deepseek_v3": deepseek_v3_config}


@pytest.mark.parametrize("package", PACKAGES)
def test_cache_no_cache_chunks_and_batches_give_the_same_tokens(monkeypatch, package):
    model, generate = made(package, engine=False), module(package, "generate")
    expected = [slowly(model, prompt, 8) for prompt in PROMPTS]
    assert generate.generate_batch(model, PROMPTS, max_new_tokens=8) == expected
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 4)
    assert [list(generate.generate(model, prompt, max_new_tokens=8)) for prompt in PROMPTS] == expected
    assert generate.generate_batch(model, PROMPTS, max_new_tokens=8) == expected
    if package == "deepseek_v3":
        assert list(generate.generate(model, PROMPT, max_new_tokens=8, speculative=True)) == expected[0]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_loaded_in_other_types_as_the_engine_does(package, dtype):
    folder, load = HERE.parent / "checkpoints" / PACKAGES[package], module(package, "weights").load_model
    plain, fast = load(folder, dtype=dtype, engine=False), load(folder, dtype=dtype)
    assert not plain.training and plain.state_dict().keys() == fast.state_dict().keys()
    for (name, ours), theirs in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
        assert ours.requires_grad == theirs.requires_grad, name


@pytest.mark.parametrize("package", PACKAGES)
def test_tables_and_a_second_copy_of_a_tied_head_are_passed_over(tmp_path, package):
    """As in Moonlight's files (inv_freq) and in those of Qwen3-0.6B (lm_head)."""
    load = module(package, "weights").load_model
    folder = write_checkpoint(tmp_path, CONFIGS[package](tie_word_embeddings=True))
    expected, tensors = load(folder, engine=False)(torch.tensor([PROMPT])), load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(9)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    model = load(folder, engine=False)
    assert torch.equal(model(torch.tensor([PROMPT])), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("package", PACKAGES)
def test_an_embedding_under_the_heads_name_is_left_to_the_engine(tmp_path, package):
    load, folder = module(package, "weights").load_model, write_checkpoint(
        tmp_path, CONFIGS[package](tie_word_embeddings=True))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load(folder).model.embed_tokens.weight, tensors["lm_head.weight"])
    with pytest.raises(ValueError, match="stores the embedding as lm_head.weight, which only the engine reads; leave"):
        load(folder, engine=False)


# The command line

def folder_of(package: str) -> str:
    return str(HERE.parent / "checkpoints" / PACKAGES[package])


@pytest.mark.parametrize("package, more", [("qwen3", []), ("qwen3_moe", ["--show-experts"]), ("deepseek_v3", []),
                                           ("deepseek_v3", ["--speculative", "--show-experts"])])
def test_plain_answers_as_without_it(monkeypatch, capfd, package, more):
    main, seen = module(package, "main"), []
    generate = main.generate
    monkeypatch.setattr(main, "generate", lambda model, ids, **rest: seen.append(model) or generate(model, ids, **rest))
    texts = []
    for flags in ([], ["--plain"]):
        assert main.main(["-m", folder_of(package), "-p", "What is RoPE?", "--dtype", "float32", *more, *flags]) == 0
        out, err = capfd.readouterr()
        texts.append((out, re.findall("^layer .*$", err, re.M)))
    assert texts[0] == texts[1] and texts[0][0].startswith("RoPE ") and bool(texts[0][1]) == ("--show-experts" in more)
    assert [runs_engine(model) for model in seen] == [True, False]


@pytest.mark.parametrize("package", PACKAGES)
def test_what_only_the_engine_can_do_gets_one_sentence(tmp_path, capfd, package):
    main = module(package, "main").main
    with pytest.raises(SystemExit) as left:
        main(["-m", folder_of(package), "-p", "x", "--plain", "--compile"])
    out, err = capfd.readouterr()
    assert left.value.code == 2 and out == "" and err.count("\n") == 1
    assert "--compile" in err and "--plain" in err

    folder = shutil.copytree(folder_of(package), tmp_path / "FP8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight") and not name.endswith("eh_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    sentence = f"{folder}: its weights are quantised, which only the engine reads; leave out --plain (or engine=False)"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        module(package, "weights").load_model(folder, engine=False)
    for dtype in ([], ["--dtype", "bfloat16"]):
        assert main(["-m", str(folder), "-p", "x", "--plain", *dtype]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.endswith(f"\n{package}: {sentence}\n") and "Traceback" not in err


@pytest.mark.parametrize("package", ["qwen3_moe", "deepseek_v3"])
def test_experts_of_the_lesson_are_not_compiled(package):
    with pytest.raises(ValueError, match="leave out --compile"):
        module(package, "generate").generate(made(package, engine=False), [1, 2], max_new_tokens=3, compiled=True)


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("package", PACKAGES)
def test_a_loaded_model_can_be_saved_for_the_next_one(tmp_path, package, engine):
    """In a file of its own numbers and no others, though the model's tensors lie in a larger one."""
    folder, load = shutil.copytree(folder_of(package), tmp_path / "Tiny"), module(package, "weights").load_model
    model = load(folder, engine=engine)
    save_file(dict(model.named_parameters()), tmp_path / "model.safetensors")
    size, count = sum(weight.nbytes for weight in model.parameters()), len(list(model.parameters()))
    assert size < (tmp_path / "model.safetensors").stat().st_size < size + 200 * count
    torch.save(model.state_dict(), tmp_path / "saved.pt")
    assert size < (tmp_path / "saved.pt").stat().st_size < size + 1000 * count
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    again = load(folder, engine=engine)
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name
