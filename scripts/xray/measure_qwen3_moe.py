"""The numbers of the pictures of qwen3_moe's lesson: runs of Qwen3-MoE-Tiny in float32, and arithmetic on configs."""

import math
from pathlib import Path

import torch

from qwen3_moe.generate import new_cache
from qwen3_moe.model import Model
from qwen3_moe.moe import Router, SparseMoeBlock
from qwen3_moe.tokenizer import Tokenizer
from qwen3_moe.weights import load_model

from .pack import visible

FOLDER = Path(__file__).resolve().parents[2] / "checkpoints/Qwen3-MoE-Tiny"
SUM = "What is 347 + 586?"
TOKEN, LAYER = 8, 4  # the lesson follows the 7 of 347, in the last layer
GROUP = range(5, 11), 1  # the tokens and the layer whose dispatch it shows
PUBLISHED = {  # vocabulary, hidden size, layers, query and key/value heads, head size, experts, width, active
    "Qwen3-32B": (151936, 5120, 64, 64, 8, 128, 1, 25600, 1),
    "Qwen3-30B-A3B": (151936, 2048, 48, 32, 4, 128, 128, 768, 8),
    "Qwen3-235B-A22B": (151936, 4096, 94, 64, 4, 128, 128, 1536, 8),
    "Qwen3-Coder-480B-A35B": (151936, 6144, 62, 96, 8, 128, 160, 2560, 8)}


def load() -> tuple[Model, Tokenizer]:
    return load_model(FOLDER, dtype="float32", engine=False), Tokenizer.from_checkpoint(FOLDER)


def as_text(tokenizer: Tokenizer, id: int) -> str:
    return visible(tokenizer.bytes_of.get(id, b"")).replace("\n", "⏎").replace(" ", "·")


def prompt(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.chat([{"role": "user", "content": SUM}])


def routed(model: Model, ids: list[int]) -> list[tuple]:
    """What each layer's router sees and says of a text: (x, weights, topk_ids, logits) of all tokens."""
    seen, hooks = [], []
    for module in model.modules():
        if isinstance(module, Router):
            hooks.append(module.register_forward_hook(
                lambda router, args, out: seen.append((args[0], *out, router.logits(args[0])))))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return seen


def rounded(values: torch.Tensor, digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def measure_layer() -> dict:
    """One token in one layer: scores, the chosen experts, their outputs' lengths, and the mixture's."""
    model, tokenizer = load()
    ids = prompt(tokenizer)
    x, weights, chosen, logits = (part[TOKEN] for part in routed(model, ids)[LAYER])
    block: SparseMoeBlock = model.model.layers[LAYER].mlp
    with torch.inference_mode():
        outputs = [block.experts[e](x[None])[0] for e in chosen.tolist()]
        y = block(x[None, None])[0, 0]
    return {"question": SUM, "token": TOKEN, "word": as_text(tokenizer, ids[TOKEN]), "layer": LAYER,
            "logits": rounded(logits, 2), "chances": rounded(logits.softmax(-1)), "chosen": chosen.tolist(),
            "weights": rounded(weights), "input": round(float(x.norm()), 2),
            "lengths": [round(float(one.norm()), 2) for one in outputs], "result": round(float(y.norm()), 2)}


def measure_cost() -> dict:
    """Parameters, and those that one token uses, in billions."""
    found = {}
    for name, (V, D, L, H, K, N, E, width, active) in PUBLISHED.items():
        attention = 2 * D * H * N + 2 * D * K * N + 2 * N
        router = D * E if E > 1 else 0
        sizes = [2 * V * D + D + L * (attention + router + 2 * D + count * 3 * D * width) for count in (E, active)]
        found[name] = [round(size / 1e9, 1) for size in sizes]
    return found


def measure_learns() -> dict:
    """Four scores move by gradient descent towards a target: with weights that add up to 1, without, and with one."""
    outputs, target, steps, rate = torch.tensor([7.0, 3.0, 14.0, 5.0]), 14.0, 20, 0.05
    runs = {}
    for name, active, normalised in (("two, renormalized", 2, True), ("two, as they are", 2, False),
                                     ("one, renormalized", 1, True)):
        scores = torch.tensor([1.0, 0.0, 1.2, -1.0], requires_grad=True)
        kept = []
        for _ in range(steps + 1):
            kept.append(rounded(scores.detach()))
            weights, chosen = scores.softmax(-1).topk(active)
            weights = weights / weights.sum() if normalised else weights
            loss = (weights @ outputs[chosen] - target) ** 2 / 2
            gradient, = torch.autograd.grad(loss, scores)
            scores = (scores - rate * gradient).detach().requires_grad_()
        runs[name] = kept
    return {"outputs": outputs.tolist(), "target": target, "rate": rate, "steps": steps, "runs": runs}


def measure_fine() -> dict:
    """The same parameters and the same work, cut finer: [experts, active, width, ways to choose]."""
    return {"total": 98304, "cuts": [[128 // n, 8 // n, 768 * n, math.comb(128 // n, 8 // n)] for n in (8, 4, 2, 1)]}


def measure_routes() -> dict:
    """Each token's two experts in each layer, and the weight of the first."""
    model, tokenizer = load()
    ids = prompt(tokenizer)
    layers = routed(model, ids)
    return {"question": SUM, "tokens": [as_text(tokenizer, id) for id in ids],
            "chosen": [topk_ids.tolist() for _, _, topk_ids, _ in layers],
            "first": [rounded(weights[:, 0], 2) for _, weights, _, _ in layers]}


def measure_dispatch() -> dict:
    """The choices of six tokens in one layer, by token and by expert."""
    model, tokenizer = load()
    ids, (tokens, layer) = prompt(tokenizer), GROUP
    topk_ids = routed(model, ids)[layer][2][tokens]
    by_expert, order = topk_ids.flatten().sort(stable=True)
    return {"layer": layer, "words": [as_text(tokenizer, ids[t]) for t in tokens], "experts": len(model.model.layers[0]
            .mlp.experts), "chosen": topk_ids.tolist(), "by_expert": by_expert.tolist(), "order": order.tolist()}


def measure_batch() -> dict:
    """How many of a layer's experts n tokens of n different texts use, on average; n of the glossary's questions."""
    from scripts.train.corpus import glossary

    model, tokenizer = load()
    questions = [f"What is {word}?" for names, _ in glossary()[:64] for word in names[:1]]
    choices = []  # (questions, layers, tokens from the end, A)
    for question in questions:
        layers = routed(model, tokenizer.chat([{"role": "user", "content": question}]))
        choices.append(torch.stack([topk_ids[-8:] for _, _, topk_ids, _ in layers]))
    every, E = torch.stack(choices), model.config.num_experts
    # Token number t of question q: a batch in which the rows are not all at the same word.
    mixed = torch.stack([every[q, :, (3 * q) % 8] for q in range(len(every))])  # (questions, layers, A)
    counts = [1, 2, 4, 8, 16, 32, 64]
    measured = []
    for n in counts:
        groups = mixed[:len(mixed) // n * n].view(-1, n, *mixed.shape[1:]).transpose(1, 2).flatten(2)
        used = [len(set(one.tolist())) for group in groups for one in group]
        measured.append(round(sum(used) / len(used) / E, 3))
    return {"counts": counts, "measured": measured, "tiny": [E, model.config.num_experts_per_tok], "large": [128, 8]}


def measure_file() -> dict:
    """Which tensors a token reads while it is decoded: for each layer the bytes of all else and of each expert."""
    model, tokenizer = load()
    ids = prompt(tokenizer)
    cache = new_cache(model, len(ids))
    with torch.inference_mode():
        model(torch.tensor([ids[:TOKEN]]), cache)
        found: list = []
        hooks = [layer.mlp.gate.register_forward_hook(lambda _, __, out: found.append(sorted(out[1][0].tolist())))
                 for layer in model.model.layers]
        model(torch.tensor([[ids[TOKEN]]]), cache)
        for hook in hooks:
            hook.remove()
    size = 2  # bytes of a bfloat16, as the file stores them
    layers = []
    for layer, used in zip(model.model.layers, found):
        expert = size * sum(p.numel() for p in layer.mlp.experts[0].parameters())
        whole = size * sum(p.numel() for p in layer.parameters())
        layers.append({"rest": whole - expert * len(layer.mlp.experts), "expert": expert, "used": used})
    V, D = model.model.embed_tokens.weight.shape
    return {"word": as_text(tokenizer, ids[TOKEN]), "experts": model.config.num_experts, "layers": layers,
            "embedding": size * V * D, "row": size * D, "head": size * V * D}


MEASURE = {"moe_layer": measure_layer, "moe_cost": measure_cost, "moe_learns": measure_learns,
           "moe_fine": measure_fine, "moe_routes": measure_routes, "moe_dispatch": measure_dispatch,
           "moe_batch": measure_batch, "moe_file": measure_file}
