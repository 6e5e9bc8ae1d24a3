"""The numbers of the pictures of qwen3/README.md: one run of Qwen3-Tiny on the page's own question, in float32."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3.generate import generate
from qwen3.layers import Attention
from qwen3.tokenizer import Tokenizer, byte_alphabet
from qwen3.weights import load_model

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints/Qwen3-Tiny"
QUESTION, TEXT = "What is RoPE?", "naïve 🙂"
HEAD = 3, 1  # a head through which the last token of the prompt looks at the word that is asked for
OPEN = 1.0  # a gate that lets more than this through is called open


@cache
def run() -> SimpleNamespace:
    """The lesson's own model reads the question; what is seen on the way is kept."""
    model, tokenizer = load_model(FOLDER, dtype="float32", engine=False), Tokenizer.from_checkpoint(FOLDER)
    ids = tokenizer.chat([{"role": "user", "content": QUESTION}], thinking=False)
    seen = SimpleNamespace(model=model, tokenizer=tokenizer, ids=ids, x=[], gates=[], scores=[], products=None)
    seen.tokens = [spelled(tokenizer, id) for id in ids]
    hooks = [model.model.norm.register_forward_pre_hook(lambda _, given: seen.x.append(given[0][0]))]
    for i, layer in enumerate(model.model.layers):
        hooks += [layer.register_forward_pre_hook(lambda _, given: seen.x.append(given[0][0])),
                  layer.mlp.gate_proj.register_forward_hook(lambda *given: seen.gates.append(F.silu(given[2][0])))]
        layer.self_attn.sdpa = watched(layer.self_attn, i, seen)
    with torch.no_grad():
        seen.logits = model(torch.tensor([ids]))[0]
        for layer in model.model.layers:
            del layer.self_attn.sdpa
        for hook in hooks:
            hook.remove()
        seen.answer = list(generate(model, ids, max_new_tokens=40, stop_ids=model.config.eos_token_id))
    return seen


def watched(attention: Attention, i: int, seen: SimpleNamespace):
    """Attention.sdpa, and what it does not return: the scores, and the products of which HEAD's one is the sum."""
    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        groups = q[0].unflatten(0, (k.shape[1], -1))  # (K, G, T, N)
        scores = torch.einsum("kgtn,ksn->kgts", groups, k[0]).flatten(0, 1) * attention.scale
        seen.scores.append(scores.masked_fill(~mask, -torch.inf))  # (H, T, T)
        if i == HEAD[0]:
            at = seen.tokens.index("·RoPE")
            products = q[0, HEAD[1], -1] * k[0, HEAD[1] // groups.shape[1], at]
            seen.products = products.unflatten(0, (2, -1)).sum(0)  # (N/2,): a pair's two products together
        return Attention.sdpa(attention, q, k, v, mask)
    return sdpa


def spelled(tokenizer: Tokenizer, id: int) -> str:
    return tokenizer.decode([id]).replace("\n", "⏎").replace(" ", "·")


def rounded(values: Tensor, digits: int = 3) -> list:
    return [round(value, digits) for value in values.tolist()]


def measure_overview() -> dict:
    seen = run()
    c = seen.model.config
    return {"question": QUESTION, "T": len(seen.ids), "L": c.num_hidden_layers, "D": c.hidden_size,
            "H": c.num_attention_heads, "K": c.num_key_value_heads, "N": c.head_dim, "F": c.intermediate_size,
            "V": c.vocab_size, "asked": seen.tokens.index("·RoPE"), "tokens": seen.tokens,
            "next": spelled(seen.tokenizer, int(seen.logits[-1].argmax()))}


def measure_spelling() -> dict:
    """One text as characters, bytes, the characters that stand for bytes in the file, and tokens."""
    tokenizer, alphabet = run().tokenizer, byte_alphabet()
    characters = [(character, list(character.encode())) for character in TEXT]
    tokens = [(id, len(tokenizer.bytes_of[id])) for id in tokenizer.encode(TEXT)]
    return {"text": TEXT, "characters": characters, "spelled": [alphabet[byte] for byte in TEXT.encode()],
            "tokens": tokens}


def measure_lengths() -> dict:
    seen = run()
    return {"tokens": seen.tokens, "lengths": [rounded(x.norm(dim=-1), 2) for x in seen.x]}


def measure_looks() -> dict:
    seen = run()
    scores = seen.scores[HEAD[0]][HEAD[1], -1]
    return {"head": HEAD, "tokens": seen.tokens, "scores": rounded(scores, 2),
            "weights": rounded(scores.softmax(-1), 4)}


def measure_pairs() -> dict:
    seen = run()
    speeds = seen.model.model.rotary_emb.inv_freq
    return {"head": HEAD, "apart": len(seen.ids) - 1 - seen.tokens.index("·RoPE"), "N": seen.model.config.head_dim,
            "products": rounded(seen.products, 2), "rounds": rounded(2 * torch.pi / speeds, 1)}


def measure_gates() -> dict:
    """The gates of layer 0 for two tokens, and how many are open."""
    seen = run()
    rows = [seen.gates[0][seen.tokens.index(token)] for token in ("·RoPE", "?")]
    return {"words": ["·RoPE", "?"], "gates": [rounded(row, 2) for row in rows],
            "open": [int((row > OPEN).sum()) for row in rows],
            "both": int(((rows[0] > OPEN) & (rows[1] > OPEN)).sum())}


def measure_heat() -> dict:
    """The first token of the answer at three temperatures: the likeliest, and how many a top_p of 0.9 keeps."""
    seen = run()
    found = []
    for temperature in (1, 2, 3):
        p = (seen.logits[-1] / temperature).softmax(-1)
        chances, ids = p.topk(6)
        ordered = p.sort(descending=True).values
        found.append({"temperature": temperature, "chances": rounded(chances, 4),
                      "tokens": [spelled(seen.tokenizer, id) for id in ids.tolist()],
                      "top_p": int((ordered.cumsum(0) - ordered < 0.9).sum()),
                      "top_20": round(float(ordered[:20].sum()), 4)})
    return {"V": len(seen.logits[-1]), "at": found}


def measure_growing() -> dict:
    """Tokens that each step sends through the layers, for the whole answer: with a cache, and without."""
    seen = run()
    T, steps = len(seen.ids), len(seen.answer) + 1  # the last one finds the end of the turn
    return {"prompt": T, "without": [T + i for i in range(steps)], "with": [T] + [1] * (steps - 1)}


MEASURE = {"overview": measure_overview, "spelling": measure_spelling, "lengths": measure_lengths,
           "looks": measure_looks, "pairs": measure_pairs, "gates": measure_gates, "heat": measure_heat,
           "growing": measure_growing}
