"""The embedded checkpoints: transformers gives the same tokens, and they know what the READMEs say that they know."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.packages import PACKAGES, module

ROOT = Path(__file__).parents[1]
ANSWERS = {package: json.loads((ROOT / "tests" / package / "reference/tiny.json").read_text())["answers"]
           for package in PACKAGES}


def embedded(package: str) -> Path:
    return ROOT / "checkpoints" / PACKAGES[package]


def with_thoughts_slowly(package: str, name: str):
    """A thought is three times as long as its answer."""
    return pytest.param(package, name, marks=[pytest.mark.slow] * name.endswith(" thinking"))


@pytest.mark.parametrize("package, name", [
    with_thoughts_slowly(package, name) for package in PACKAGES for name in ANSWERS[package]])
def test_prompts_and_greedy_tokens_are_those_of_transformers(package, name):
    question, _, mode = name.rpartition(" ")
    tokenizer = module(package, "tokenizer").Tokenizer.from_checkpoint(embedded(package))
    model = module(package, "weights").load_model(embedded(package))
    prompt = tokenizer.chat([{"role": "user", "content": question}], thinking=mode == "thinking")
    assert prompt == ANSWERS[package][name]["prompt"]
    generate, stop_ids = module(package, "generate").generate, model.config.eos_token_id
    new = list(generate(model, prompt, max_new_tokens=100, stop_ids=stop_ids))
    assert [*new, tokenizer.end_of_turn] == ANSWERS[package][name]["new"]


@pytest.mark.parametrize("package", PACKAGES)
def test_it_is_small_and_of_the_real_architecture(package):
    model = module(package, "weights").load_model(embedded(package))
    config = model.config
    assert (embedded(package) / "model.safetensors").stat().st_size <= 8e6
    assert {p.dtype for name, p in model.named_parameters() if not name.endswith("_bias")} == {torch.bfloat16}
    if package == "deepseek_v3":
        assert config.q_lora_rank and config.n_group >= 2
        assert config.n_shared_experts and config.first_k_dense_replace == 1
        assert config.rope_scaling and config.rope_scaling.mscale_all_dim and config.num_nextn_predict_layers == 1
        stored = load_file(embedded(package) / "model.safetensors")  # with the two copies that the release has
        assert torch.equal(stored["model.layers.5.embed_tokens.weight"], stored["model.embed_tokens.weight"])
        assert torch.equal(stored["model.layers.5.shared_head.head.weight"], stored["lm_head.weight"])
        return
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    if package == "qwen3":
        assert config.tie_word_embeddings
    else:
        assert config.num_experts >= 8 and config.num_experts_per_tok == 2


@pytest.mark.slow
@pytest.mark.ahead
@pytest.mark.parametrize("package", PACKAGES)
def test_the_accuracy_that_the_readme_claims(package):
    # By a process with one thread, which is as quick for models of this size and leaves the other tests a processor.
    command = [sys.executable, "-m", "scripts.train", package, "--evaluate-only"]
    shown = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                           stdout=subprocess.PIPE, check=True).stdout
    right = {what: float(share) / 100 for share, what in re.findall(r"^ *([\d.]+)%  (.+)$", shown, re.M)}
    for what in ("2 digits", "3 digits", "4 digits", "three of 2 digits"):
        assert right[f"held-out sums, {what}, thinking"] >= 0.98
    for mode in ("direct", "thinking"):
        assert right[f"glossary, {mode}"] >= 0.98
        assert right[f"a word in own words, {mode}: right or half right"] >= 0.75
        # Below 0.05 is what we want; a model of this size is still too sure of words that it has misread.
        assert right[f"anything in own words, {mode}: wrong"] <= (0.14 if mode == "thinking" else 0.08)
    assert right["24 glossary questions in one conversation: right, worst turn"] >= 0.95
    assert right["24 mixed questions in one conversation: right or half right"] >= 0.90
    if package != "qwen3":
        assert right["least used expert, of its fair share"] >= 0.25
    if package == "deepseek_v3":
        assert right["drafts accepted, thinking"] >= 0.7 and right["drafts accepted, direct"] >= 0.7
    # The README's table; another processor may round a few answers differently.
    table = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+) % \|$", (ROOT / package / "README.md").read_text(), re.M))
    assert table.keys() == right.keys()
    assert all(abs(float(table[what]) / 100 - share) <= 0.01 for what, share in right.items())
