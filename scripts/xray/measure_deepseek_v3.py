"""The numbers of DeepSeek-V3's pictures, from real runs of the embedded model in float32 or from a config's sizes."""

import torch
from torch import Tensor

from deepseek_v3.generate import generate
from deepseek_v3.layers import rotate
from deepseek_v3.model import Model
from deepseek_v3.speculative import verify
from deepseek_v3.tokenizer import Tokenizer
from deepseek_v3.weights import load_model

from .pack import visible

FOLDER, QUESTION = "checkpoints/DeepSeek-V3-Tiny", "What is RoPE?"
# DeepSeek-V3 as published: heads, latent rank, and the sizes of a head without position, with it, and of a value.
H, R, N, P, M = 128, 512, 128, 64, 128


def opened() -> tuple[Model, Tokenizer, list[int]]:
    """The plain model, its tokenizer, and the question without thinking."""
    tokenizer = Tokenizer.from_checkpoint(FOLDER)
    model = load_model(FOLDER, dtype="float32", engine=False)
    return model, tokenizer, tokenizer.chat([{"role": "user", "content": QUESTION}], thinking=False)


def words(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Tokens as a picture spells them: a blank is a dot."""
    return [visible(tokenizer.bytes_of[id]).replace(" ", "·") for id in ids]


def surely(chance: Tensor) -> float:
    """Rounded, and never up to 1."""
    return min(round(float(chance), 4), 0.9999)


def inputs(model: Model, ids: list[int], name: str) -> Tensor:
    """What a part of the model was given for these tokens, (T, …)."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    hook.remove()
    return seen[0].squeeze(0)


def measure_absorption() -> dict:
    return {"heads": H, "latent": R, "rope": P, "key": N, "value": M, "rebuilt": H * (N + M)}


def measure_rope_breaks() -> dict:
    """Scores of the last token if its head rotated all of a key, and what one folded query would make of them."""
    model, tokenizer, ids = opened()
    layer, head = 4, 5
    attention = model.model.layers[layer].self_attn
    N, M, R = attention.qk_nope_head_dim, attention.v_head_dim, attention.kv_lora_rank
    x = inputs(model, ids, f"model.layers.{layer}.self_attn")
    with torch.inference_mode():
        q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(x))).unflatten(-1, (-1, N + 32))
        c = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(x)[:, :R])  # (T, R)
        W_UK = attention.kv_b_proj.weight.view(-1, N + M, R)[head, :N]  # (N, R)
        angles = torch.arange(len(ids))[:, None] / 10000 ** (torch.arange(0, N, 2) / N)
        cos, sin = angles.cos(), angles.sin()
        q_last, keys = q[-1, head, :N], c @ W_UK.T
        true = rotate(keys, cos, sin) @ rotate(q_last, cos[-1], sin[-1])  # both are rotated, as RoPE has it
        folded = c @ (W_UK.T @ q_last)  # right for the query's own position, where the rotations cancel
    return {"layer": layer, "head": head, "tokens": words(tokenizer, ids),
            "true": [round(score, 3) for score in true.tolist()],
            "folded": [round(score, 3) for score in folded.tolist()]}


def measure_forms() -> dict:
    """Multiplications of one layer for T new tokens after 4,096 cached ones, in billions."""
    cached, news = 4096, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    expanded = [H * ((cached + T) * R * (N + M) + T * (cached + T) * (N + P + M)) / 1e9 for T in news]
    absorbed = [H * (T * R * (N + M) + T * (cached + T) * (R + P + R)) / 1e9 for T in news]
    last = max(T for T in range(1, cached) if cached * R * (N + M) > T * (cached + T) * (2 * R - N - M))
    return {"cached": cached, "news": news, "expanded": expanded, "absorbed": absorbed, "last": last}


def measure_bias_and_groups() -> dict:
    """The router of layer 1 and the token in which the bias and the groups both change the choice."""
    model, tokenizer, ids = opened()
    layer, at = 1, 4
    gate = model.model.layers[layer].mlp.gate
    x = inputs(model, ids, f"model.layers.{layer}.mlp.gate")[at:at + 1]
    with torch.inference_mode():
        scores, bias = gate.logits(x).sigmoid()[0], gate.e_score_correction_bias.clone()
        weights, chosen = gate(x)
        gate.e_score_correction_bias.zero_()
        plain = gate(x)[1]
    return {"layer": layer, "token": words(tokenizer, ids)[at], "groups": gate.n_group, "best": gate.topk_group,
            "scores": [round(s, 3) for s in scores.tolist()], "bias": [round(b, 3) for b in bias.tolist()],
            "chosen": chosen[0].tolist(), "weights": [round(w, 4) for w in weights[0].tolist()],
            "without_bias": plain[0].tolist()}


def measure_mtp() -> dict:
    """What model and draft layer say at each place of the answer: the next token, and the one after it."""
    model, tokenizer, ids = opened()
    answer = list(generate(model, ids, max_new_tokens=7, stop_ids=model.config.eos_token_id))
    text = torch.tensor([ids + answer])
    with torch.inference_mode():
        hidden = model.model(text)
        following = model.lm_head(hidden)[0].softmax(-1).max(-1)
        second = model.mtp(text[:, 1:], hidden[:, :-1])[0].softmax(-1).max(-1)
    first, last = len(ids) - 1, len(ids) + len(answer) - 2
    places = range(first, last)
    every = words(tokenizer, ids + answer)
    return {"question": QUESTION, "reads": [every[t] for t in places], "then": [every[t + 1] for t in places],
            "after": [every[t + 2] for t in places],
            "next": [[words(tokenizer, [int(following.indices[t])])[0], surely(following.values[t])]
                     for t in places],
            "second": [[words(tokenizer, [int(second.indices[t])])[0], surely(second.values[t])]
                       for t in places]}


def measure_acceptance() -> dict:
    """The example by hand, and what 100,000 drafts give that `verify` looks at."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    generator, count = torch.Generator().manual_seed(0), 100_000
    drafts = torch.multinomial(q, count, replacement=True, generator=generator).tolist()
    drawn = torch.tensor([verify(p, q, draft, generator) for draft in drafts])
    shares = (torch.bincount(drawn, minlength=3) / count).tolist()
    return {"p": [0.5, 0.3, 0.2], "q": [0.2, 0.5, 0.3], "count": count, "drawn": [round(s, 4) for s in shares]}


def measure_fp8() -> dict:
    """The error of all other weights of a matrix in which one is larger, with a scale for all or for each block."""
    size, block, times = 512, 128, [1, 10, 100, 1000, 10_000, 100_000]
    weight = 0.02 * torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    found = {"matrix": [], "block": []}
    for factor in times:
        W = weight.clone()
        W[200, 300] = 0.02 * 4 * factor
        for name, side in (("matrix", size), ("block", block)):
            tiles = W.unfold(0, side, side).unfold(1, side, side)  # (…, …, side, side)
            scale = tiles.abs().amax((-2, -1), keepdim=True) / 448  # the largest number of e4m3
            error = (tiles / scale).to(torch.float8_e4m3fn).float() * scale - tiles
            others = tiles.abs() < 0.02 * 6
            found[name].append(round(float(error[others].norm() / tiles[others].norm()), 4))
    return {"size": size, "side": block, "times": times} | found


MEASURE = {"absorption": measure_absorption, "rope_breaks": measure_rope_breaks, "forms": measure_forms,
           "bias_and_groups": measure_bias_and_groups, "mtp": measure_mtp, "acceptance": measure_acceptance,
           "fp8": measure_fp8}
