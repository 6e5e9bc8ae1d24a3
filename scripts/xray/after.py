"""What is computed after the run, from what was recorded and with the model's own parts.

    lens      what the head would make of the residual stream at every depth: the logit lens
    chances   how the sampler saw the last of them: the chance of each token to be drawn
    matters   each head and each expert switched off in turn: what the written token's chance is then
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from .record import Row
from .switch import Part, count_experts, switched

# What switching off every part in turn may cost, which is seconds: tokens that are read, and multiplications.
SWEEP_TOKENS, SWEEP = 20_000, 6 * 10**10


@torch.inference_mode()
def lens(model: torch.nn.Module, row: Row) -> Tensor:
    """Logits (2L + 1, V) float32: of the embedding, then after attention and after the MLP of each layer.

    The norm takes its statistics anew at each depth. The last line is the run's own where the run computed it.
    """
    layers = torch.stack((row.between, row.stream[:-1]), 1).flatten(0, 1)  # in turn
    stream = torch.cat((row.stream[-1:], layers))
    logits = model.lm_head(model.model.norm(stream[None]))[0].float()
    if row.logits is not None:
        logits[-1] = row.logits
    return logits


def given(generate, logits: Tensor, ids: Sequence[int], prompt: int, sampling: dict) -> Tensor:
    """The logits (V,) that the sampler was given for the token after `ids`: the head's, after the penalties."""
    penalties = sampling.get("repetition_penalty"), sampling.get("presence_penalty")
    if penalties[0] in (None, 1) and not penalties[1]:
        return logits
    text, answer = torch.zeros_like(logits, dtype=torch.bool), torch.zeros_like(logits, dtype=torch.bool)
    text[list(ids)] = True
    answer[list(ids[prompt:])] = True
    return generate.penalise(logits[None], text[None], answer[None], penalties[0] or 1.0, penalties[1] or 0.0)[0]


def chances(generate, logits: Tensor, sampling: dict) -> Tensor:
    """With which probability the sampler draws each token, (V,), from the logits that it is given, (V,)."""
    if not sampling.get("temperature"):
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    settings = (sampling.get(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    probabilities, ids = generate.top_k_top_p(logits[None], *settings)
    return torch.zeros_like(logits).scatter(0, ids[0], probabilities[0] / probabilities.sum())


@torch.inference_mode()
def forced(model: torch.nn.Module, generate, ids: Sequence[int], rows: Sequence[int],
           parts: Sequence[Part] = ()) -> Tensor:
    """The chance (rows,) of each token that was written, if `parts` are off and all before it is as it was."""
    cache = generate.new_cache(model, len(ids))
    unread = torch.tensor([ids[:-1]], device=model.model.norm.weight.device)
    with switched(model, parts) if parts else nullcontext():
        states = torch.cat([model.model(chunk, cache) for chunk in unread.split(generate.PREFILL_CHUNK, 1)], 1)
        logits = model.lm_head(states[:, list(rows)])[0].float()  # (rows, V)
    written = torch.tensor([ids[row + 1] for row in rows], device=logits.device)
    return logits.softmax(-1).gather(-1, written[:, None])[:, 0].cpu()


def matters(model: torch.nn.Module, generate, ids: Sequence[int], rows: Sequence[int]) -> dict | None:
    """The same with each part off in turn; None where that would take long.

    heads (L, H, rows); experts (layers with experts, E, rows); whole (rows,), with nothing off: the same pass, so that
    what differs is the part alone and not the rounding of another shape.
    """
    config = model.config
    parts = {"heads": [[Part("head", layer, head) for head in range(config.num_attention_heads)]
                       for layer in range(config.num_hidden_layers)],
             "experts": [[Part("expert", layer, expert) for expert in range(count_experts(config, layer))]
                         for layer in range(config.num_hidden_layers) if count_experts(config, layer)]}
    tokens = len(ids) * sum(len(layer) for layers in parts.values() for layer in layers)
    if not rows or tokens > SWEEP_TOKENS or tokens * sum(weight.numel() for weight in model.parameters()) > SWEEP:
        return None
    off = {what: [torch.stack([forced(model, generate, ids, rows, [part]) for part in layer]) for layer in layers]
           for what, layers in parts.items()}
    return {"whole": forced(model, generate, ids, rows)} | {
        what: torch.stack(layers) if layers else torch.zeros(0, 0, len(rows)) for what, layers in off.items()}
