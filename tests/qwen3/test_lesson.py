"""The experiments that qwen3/README.md proposes: its own code, one change each, gives what the page says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "qwen3/README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
RIGHT = "RoPE turns pairs of values in every query and key by angles that grow with the position."
NEIGHBORS = """def rotate(x, cos, sin):
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
"""

# (What is replaced in the page's first block, by what, how the answer then begins, words of it that the page shows)
EXPERIMENTS = {
    "no layers": ("", "\nlayer = lambda x, w, c: x\n", "\n\n\n\n", "blank lines without end"),
    "attention alone": ("    return x + mlp(rms_norm(x, w(\"post_attention_layernorm\")), w)", "    return x",
                        " code code code", "code code code"),
    "no norm": ("", "\nrms_norm = lambda x, w, eps=1e-6: w * x\n", "!!!!!!!!", "`!!!!!!!!`"),
    "the mean subtracted": ("x32 = x.float()", "x32 = x.float() - x.float().mean(-1, keepdim=True)", RIGHT,
                            "the same answer as before"),
    "wrong groups": ("h.repeat_interleave(len(q) // len(k), dim=0)", "h.repeat(3, 1, 1)",
                     "I do not know that get get outputs.", "I do not know that get get outputs."),
    "no root of N": (" / c.head_dim ** 0.5", "", "RoPE turns pairs of values in every query and of key",
                     "begins well and ends in a tangle"),
    "no norm of queries": ("rms_norm(q, w(\"self_attn.q_norm\"))", "q", RIGHT, "on the queries it stays right"),
    "no norm of keys": ("rms_norm(k, w(\"self_attn.k_norm\"))", "k", "I do what it may be.", "I do what it may be."),
    "1000 further": ("first + torch.arange(T)", "1000 + torch.arange(T)", RIGHT, "only distances count"),
    "no turning": ("", "\nrotate = lambda x, cos, sin: x\n", "RoPE turns pairs of values in theta is theta is theta",
                   "in theta is theta is theta"),
    "neighbors": ("", "\n" + NEIGHBORS, "I do not know that.", "Neighbors: \"I do not know that.\""),
    "ReLU": ("silu(x @", "torch.relu(x @", RIGHT, "With ReLU, the same answer"),
}


def answer(before: str, after: str) -> str:
    code = BLOCKS[0].replace(before, after) if before else BLOCKS[0] + after
    assert code != BLOCKS[0]
    checked = BLOCKS[1].replace("assert ", "assert True or ").replace("print(answer())", "")  # it is no longer Qwen3
    namespace: dict = {}
    exec(code + checked, namespace)
    return namespace["answer"](24)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_ends_as_the_page_says(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    before, after, begins, said = EXPERIMENTS[name]
    found = answer(before, after)
    assert found == begins if begins == RIGHT else found.startswith(begins)
    assert found != RIGHT or begins == RIGHT
    assert said in " ".join(PAGE.split())


@pytest.mark.parametrize("off, begins", [([1], RIGHT), ([2], RIGHT), ([1, 2], "Read the most size of weights")])
def test_looking_is_not_causing(off, begins, monkeypatch):
    """Heads of layer 3 give nothing; which layer it is, the counter says."""
    monkeypatch.chdir(ROOT)
    before = "    return (scores.softmax(-1) @ v)"
    after = f"""    out = scores.softmax(-1) @ v
    calls.append(0)
    if len(calls) % 5 == 4:
        out[{off}] = 0
    return out"""
    code = BLOCKS[0].replace(before, after)
    assert code != BLOCKS[0] and "and it begins \"Read the most size of weights\"" in " ".join(PAGE.split())
    namespace: dict = {"calls": []}
    exec(code + BLOCKS[1].replace("assert ", "assert True or ").replace("print(answer())", ""), namespace)
    namespace["calls"].clear()
    assert namespace["answer"](24).startswith(begins)


def test_without_the_gate_it_is_noise(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert "RoPE" not in answer("silu(x @ w(\"mlp.gate_proj\").T) * ", "")


@pytest.mark.parametrize("question, depth, word, chance", [("What is the KV cache?", 4, "The", 0.96),
                                                           ("What is 3 + 4?", 5, "7", 0.59)])
def test_the_lens_sees_the_answers_where_the_page_says(question, depth, word, chance, monkeypatch):
    monkeypatch.chdir(ROOT)
    page: dict = {}
    exec(BLOCKS[0] + BLOCKS[1].replace("print(answer())", ""), page)
    W, c, tokenizer = page["W"], page["c"], page["tokenizer"]
    x = W["model.embed_tokens.weight"][page["torch"].tensor(
        tokenizer.chat([{"role": "user", "content": question}], thinking=False))]
    said = []
    for i in range(c.num_hidden_layers + 1):
        chances = (page["rms_norm"](x[-1], W["model.norm.weight"]) @ W["lm_head.weight"].T).softmax(-1)
        said.append((tokenizer.decode([int(chances.argmax())]), float(chances.max())))
        x = page["layer"](x, page["part"](W, i), c) if i < c.num_hidden_layers else x
    assert said[depth] == (word, pytest.approx(chance, abs=0.02)) and said[depth - 1][0] != word
    assert f"`{word}` comes at depth {depth}" in PAGE and f"{chance:.0%}".replace("%", " %") in PAGE
