"""What rounding costs: the error of the embedded models' matrices, their answers and their loss, by bits and groups."""

import importlib
import random
from pathlib import Path

from qwen3.engine.rounding import is_rounded, nearest, round_matrix

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ..train import data, evaluate, grade, sums
from ..train.corpus import entries

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
EMBEDDED = {"qwen3": "Qwen3-Tiny", "qwen3_moe": "Qwen3-MoE-Tiny", "deepseek_v3": "DeepSeek-V3-Tiny"}
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (8, 16, 32, "row", "matrix")  # what shares a scale
ASKED, COUNT = (16, 8, 4, 3, 2), 200  # bits; questions of each kind, at most
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EIGHT = [0.31, -0.70, 0.12, 0.06, -0.24, 0.56, -0.08, 0.40]  # as in engine/int4.py


def round_and_back(W: Tensor, bits: int, group: int, searched: bool = True) -> Tensor:
    """W (O, I) as integers times their scales, in float32; the last group of a row may be shorter.

    Not searched: the scale is the largest value over the largest integer.
    """
    I = W.shape[1]
    W = F.pad(W, (0, -I % group))  # zeros stay zeros, and change no scale
    if searched:
        q, scale = round_matrix(W, bits, group)
        return (q.unflatten(1, (-1, group)) * scale.float()[..., None]).flatten(1)[:, :I]
    W, most = W.float().unflatten(1, (-1, group)), 2 ** (bits - 1) - 1
    scale = (W.abs().amax(-1, keepdim=True) / most).bfloat16().float()
    return (nearest(W, scale, most) * scale).flatten(1)[:, :I]


def matrices(package: str) -> list[Tensor]:
    """Those of an embedded checkpoint that become integers."""
    tensors = load_file(CHECKPOINTS / EMBEDDED[package] / "model.safetensors")
    return [W.float() for name, W in tensors.items() if is_rounded(name, tuple(W.shape), 1)]


def error(Ws: list[Tensor], bits: int, group: int | str, searched: bool = True) -> tuple[float, float]:
    """(Root mean square of W - W' relative to that of W, bits stored for a weight with its share of a scale)."""
    lost = size = count = scales = 0
    for W in Ws:
        W = W.view(1, -1) if group == "matrix" else W
        one = W.shape[1] if isinstance(group, str) else group
        lost += float((W - round_and_back(W, bits, one, searched)).square().sum())
        size, count = size + float(W.square().sum()), count + W.numel()
        scales += len(W) * -(-W.shape[1] // one)
    return (lost / size) ** 0.5, bits + 16 * scales / count


def short(number: float) -> float:
    return float(f"{number:.4g}")


def errors() -> dict:
    """By bits and group, for Qwen3-Tiny; and what the search of the scale gains in all three, in groups of 32."""
    Ws = matrices("qwen3")
    table = {str(bits): [tuple(map(short, error(Ws, bits, group, searched=False))) for group in GROUPS]
             for bits in BITS[1:]}
    search = {}
    for package in EMBEDDED:
        Ws = matrices(package)
        search[package] = {str(bits): [short(error(Ws, bits, 32, searched)[0]) for searched in (False, True)]
                           for bits in (3, 4, 8)}
    return {"groups": list(GROUPS), "errors": table, "search": search}


def outlier() -> dict:
    """Eight weights in four bits, as they are and with one that is far larger."""
    found = {}
    for name, W in (("without", EIGHT), ("with", [*EIGHT[:-1], 3.5])):
        W = torch.tensor(W)
        scale = W.abs().max() / 7
        q = (W / scale).round()
        lost = (W - scale * q)[:-1].square().mean().sqrt()
        found[name] = {"weights": [short(w) for w in W.tolist()], "scale": short(scale.item()),
                       "q": q.int().tolist(), "error": short(lost.item())}
    return found


def held_out_turns(tokenizer) -> list[data.Part]:
    """Conversations that no training has seen: sums of held-out numbers, thought through, and questions in people's
    own words with the answers that would be right."""
    turns, rng, by_name = data.Turns(tokenizer), random.Random(0), {entry.names[0]: entry for entry in entries()}
    parts = []
    while len(parts) < 100:
        numbers = [rng.randrange(1000), rng.randrange(1000)]
        if sums.is_held_out(*numbers):
            question = f"What is {numbers[0]} + {numbers[1]}?"
            parts.append(turns.turn(question, sums.thought_of(numbers), str(sum(numbers))))
    for item in grade.questions("heldout"):
        if item["kind"] in ("what", "explain", "why"):
            entry = by_name[item["about"][0]]
            parts.append(turns.turn(item["question"], None, entry.why if item["kind"] == "why" else entry.what))
    return parts


@torch.inference_mode()
def loss(model: torch.nn.Module, tokenizer) -> float:
    """The mean surprise of a token of the answers of `held_out_turns`, in nats."""
    total = count = 0
    for ids, first, end in held_out_turns(tokenizer):
        ids = torch.tensor([*tokenizer.bos_ids, *ids])
        first, end = first + len(tokenizer.bos_ids), end + len(tokenizer.bos_ids)
        logits = model(ids[None, :-1])[0, first - 1:end - 1]
        total += float(F.cross_entropy(logits.float(), ids[first:end], reduction="sum"))
        count += end - first
    return total / count


def examinee(package: str, bits: int, group: int = 32, kind: str = "_proj") -> evaluate.Examinee:
    """An embedded model in float32, its matrices of some kind rounded; 16 bits: as it is."""
    folder = CHECKPOINTS / EMBEDDED[package]
    one = evaluate.Examinee(package, folder)
    one.model = importlib.import_module(f"{package}.weights").load_model(folder, dtype="float32")
    for name, weight in one.model.named_parameters():
        if bits < 16 and kind in name and is_rounded(name, tuple(weight.shape), 1):
            weight.data = round_and_back(weight.data, bits, group)
    return one


def asked(one: evaluate.Examinee, count: int) -> dict[str, float]:
    """Shares of right answers: held-out sums of three digits with thinking, and words of the glossary without."""
    words = [(f"What is {entry.names[0]}?", entry.what) for entry in entries()]
    words = random.Random(0).sample(words, min(count, len(words)))
    exam = [item for item in grade.questions("heldout") if item["kind"] in evaluate.WORDS][:count]
    own = one.verdicts(exam, False)
    found = {"sums": one.share(evaluate.held_out_sums(3, count), True), "glossary": one.share(words, False),
             "own words": own.count("right") / len(own)}
    return {kind: short(share) for kind, share in found.items()}


def answers(packages=tuple(EMBEDDED)) -> dict:
    """By package and bits: the loss, and shares of right answers. By kind of matrix: the loss with that in 2 bits."""
    models, kinds = {}, {}
    for package in packages:
        for bits in (16, *reversed(BITS)):
            one = examinee(package, bits)
            line = {"loss": short(loss(one.model, one.tokenizer))}
            if bits in ASKED:
                line |= asked(one, COUNT)
            models.setdefault(package, {})[str(bits)] = line
            print(f"{package:12}{bits:3} bits: " + ", ".join(f"{what} {value:.4g}" for what, value in line.items()),
                  flush=True)
    for kind in KINDS:
        one = examinee("qwen3", 2, kind=kind)
        kinds[kind] = short(loss(one.model, one.tokenizer))
    return {"models": models, "kinds": kinds}


MEASURE = {"outlier": outlier, "errors": errors, "answers": answers}
