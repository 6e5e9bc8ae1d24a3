"""The embedded checkpoint: transformers gives the same tokens, and it knows what the README says that it knows."""

import json
from pathlib import Path

import pytest
import torch

from qwen3.generate import generate
from qwen3.tokenizer import Tokenizer
from qwen3.weights import load_model

ROOT = Path(__file__).parents[2]
TINY = ROOT / "checkpoints/Qwen3-Tiny"
ANSWERS = json.loads((Path(__file__).parent / "reference/tiny.json").read_text())["answers"]


@pytest.mark.parametrize("name", ANSWERS)
def test_prompts_and_greedy_tokens_are_those_of_transformers(name):
    question, _, mode = name.rpartition(" ")
    tokenizer, model = Tokenizer.from_checkpoint(TINY), load_model(TINY)
    prompt = tokenizer.chat([{"role": "user", "content": question}], thinking=mode == "thinking")
    assert prompt == ANSWERS[name]["prompt"]
    new = list(generate(model, prompt, max_new_tokens=100, stop_ids=model.config.eos_token_id))
    assert [*new, tokenizer.control_ids["<|im_end|>"]] == ANSWERS[name]["new"]


def test_it_is_small_and_of_the_real_architecture():
    model = load_model(TINY)
    config = model.config
    assert (TINY / "model.safetensors").stat().st_size <= 4e6
    assert config.num_key_value_heads < config.num_attention_heads and config.tie_word_embeddings
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_corpus_is_as_promised():
    from scripts import tiny_corpus, train_tiny

    words = tiny_corpus.glossary()
    assert len(words) >= 120 and len({names[0] for names, _ in words}) == len(words)
    assert not set(tiny_corpus.TRAIN_PHRASINGS) & set(tiny_corpus.HELD_OUT_PHRASINGS)
    import random
    corpus, rng = train_tiny.Corpus("x", "qwen3"), random.Random(0)
    for _ in range(2000):  # no sum that is asked at the end was ever trained on
        question, _, answer = corpus.draw_sum(rng, thinking=True)
        a, b = (int(number) for number in "".join(c if c.isdigit() else " " for c in question).split())
        assert a + b == int(answer) and not train_tiny.is_held_out(a, b)


@pytest.mark.slow
def test_the_accuracy_that_the_readme_claims():
    from scripts.train_tiny import evaluate

    right = evaluate(TINY)
    assert right["held-out sums, 3 digits, thinking"] >= 0.98
    assert right["held-out sums, 2 digits, thinking"] >= 0.98
    assert right["held-out sums, 2 digits, direct"] >= 0.95
    assert right["glossary, direct"] >= 0.98 and right["glossary, thinking"] >= 0.98
    assert right["glossary, held-out phrasings, direct"] >= 0.90
    assert right["glossary, held-out phrasings, thinking"] >= 0.90
