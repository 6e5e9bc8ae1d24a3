"""A recording becomes the numbers and texts of one run on the page, panel by panel. Layers, heads, experts and tokens
count from 0. A step is a row of the recording: steps[r] is the position of the token that was read, the next is the
one that was written.

    words, tokens      ids and what they stand for        | cache     what is kept of each token
    lens               what each depth would have said    | choice    from logits to one token
    attention          where each head looked             | drafts    guessed, kept and refused
    rope               how fast each pair turns           | cost      seconds and bytes by part
    experts            who worked on what                 | matters   each part switched off in turn
"""

import torch

from .after import chances, given, lens, matters
from .limits import STRONGEST
from .pack import Words, fine_roots, packed, roots, small_numbers
from .record import Recorder

LIKELIEST = 4  # tokens of each cell of the lens
LOGITS = 256  # of each choice; the rest is a histogram
NAMED = 24  # of these the page can name
SCORES = 200_000  # numbers of all routers' scores; larger runs show the chosen experts alone
LATENTS, LATENT_LAYERS = 64, 3  # of the cache: tokens and layers whose numbers are shown


def run_data(seen: Recorder, generate, words: Words, ids: list[int], prompt: int, sampling: dict, full: bool) -> dict:
    """What the panels show of one run; of a run that is only compared with (not `full`), tokens, lens and experts.

    `generate` is the package's module of that name.
    """
    steps, config = list(seen.rows), seen.model.config
    control = set(words.tokenizer.control_ids.values())
    run = {"prompt": prompt, "tokens": [words(id) for id in ids], "control": sorted(control & set(ids)),
           "steps": steps, "whole": seen.wanted.whole, "most": seen.wanted.most, "L": len(seen.layers)}
    lenses, chosen = [], []
    for position, row in seen.rows.items():  # one by one: for a large model, its logits are 60 MB
        logits = lens(seen.model, row)
        lenses.append(lens_of(words, logits, ids[position + 1]))
        if full:
            chosen.append(choice_of(generate, words, logits[-1], ids, position, prompt, sampling))
    run["lens"] = {what: [one[what] for one in lenses] for what in ("top", "written")}
    run["experts"] = experts(seen, config) if seen.loads else None
    run["passes"] = seen.passes
    if full:
        run["choice"] = choices(chosen)
        run["drafts"] = [draft | {"drafted": words(draft["drafted"]), "token": words(draft["token"])}
                         for draft in seen.drafts]
        run["attention"] = attention(seen, steps, config)
        run["rope"] = rope(seen, config)
        run["cache"] = cache(seen, config)
        run["cost"] = cost(seen)
        run["matters"] = what_matters(matters(seen.model, generate, ids, steps))
    return run


def lens_of(words: Words, logits: torch.Tensor, written: int) -> dict:
    """logits (2L + 1, V) -> the likeliest tokens after the embedding and each layer, and at every depth, between
    attention and MLP too, the chance of the token that was written."""
    every = logits.logsumexp(-1, keepdim=True)
    top = (logits[::2] - every[::2]).topk(min(LIKELIEST, logits.shape[-1]))
    return {"top": [[[words(id), round(chance, 4)] for id, chance in zip(ids, chances)]
                    for ids, chances in zip(top.indices.tolist(), top.values.exp().tolist())],
            "written": small_numbers((logits[:, written] - every[:, 0]).exp(), 5)}


def choice_of(generate, words: Words, logits: torch.Tensor, ids: list[int], position: int, prompt: int,
              sampling: dict) -> dict:
    """What the sampler was given for the token after `position`, likeliest first, and the chances that it made of it.

    For a token of the prompt nothing was drawn: then the chances are those of the model.
    """
    drawn, written = position + 1 >= prompt, ids[position + 1]
    if drawn:
        logits = given(generate, logits, ids[:position + 1], prompt, sampling)
    drawing = chances(generate, logits, sampling if drawn else {"temperature": 1.0})
    best, rest = logits.sort(descending=True, stable=True), []
    tail = best.values[LOGITS:]
    half_steps = ((best.values[0] - tail) * 2).floor().clamp(max=200).long()
    for step in half_steps.unique().tolist():  # the rest in steps of half a logit: [their mean, how many]
        rest.append([round(float(tail[half_steps == step].mean()), 3), int((half_steps == step).sum())])
    named = best.indices[:NAMED].tolist()
    return {"logits": best.values[:LOGITS], "ids": [words(id) for id in named],
            "chances": small_numbers(drawing[named], 6), "all": round(float(logits.logsumexp(-1)), 5), "rest": rest,
            "written": [words(written), round(float(logits[written]), 4), round(float(drawing[written]), 6)],
            "place": int((best.indices == written).nonzero()), "possible": int((drawing > 0).sum()), "drawn": drawn}


def choices(every: list[dict]) -> dict:
    """All of them; the logits (steps, kept) in one piece."""
    logits = torch.stack([choice.pop("logits") for choice in every]) if every else torch.zeros(0, 0)
    return {"kept": logits.shape[1], "logits": packed(logits.float()), "steps": every}


def attention(seen: Recorder, steps: list[int], config) -> dict:
    """Whole: bytes of roots (L, H, all keys of step 0, of step 1, …), where step r has steps[r] + 1 keys. Else the
    strongest keys (L, H, steps, 8): places in two bytes (four if `wide`) and bytes of roots."""
    H = config.num_attention_heads
    kept = {"H": H, "K": getattr(config, "num_key_value_heads", H), "error": seen.error, "strongest": STRONGEST}
    if hasattr(config, "kv_lora_rank"):
        kept["K"] = H  # each head makes keys and values of its own from the latents
    L, rows = len(seen.layers), list(seen.rows.values())
    if seen.wanted.whole:
        every = torch.cat([row.attention for row in rows], -1) if rows else torch.zeros(0)
        return kept | {"whole": True, "data": packed(roots(every))}
    places, shares = torch.zeros(2, L, H, len(rows), STRONGEST)
    for r, row in enumerate(rows):
        keys = row.places.shape[-1]
        places[:, :, r, :keys], shares[:, :, r, :keys] = row.places, row.shares
    wide, places = max(steps, default=0) >= 1 << 16, places.to(torch.int32)
    return kept | {"whole": False, "wide": wide, "places": packed(places if wide else places.to(torch.uint16)),
                   "data": packed(roots(shares))}


def rope(seen: Recorder, config) -> dict:
    """Radians a token of each pair, and those without YaRN; the angle at position p is p times that. `error`: how far
    the cosines that the model was given are from those of these angles."""
    rotary = seen.model.model.rotary_emb
    fast, pairs = rotary.inv_freq.cpu().double(), len(rotary.inv_freq)
    plain = config.rope_theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    error = max((float((row.turns[0].cpu() - (position * fast).cos() * rotary.scale).abs().max())
                 for position, row in seen.rows.items()), default=0.0)
    return {"frequencies": [float(f"{value:.6g}") for value in fast.tolist()], "theta": config.rope_theta,
            "plain": [float(f"{value:.6g}") for value in plain.tolist()], "scale": rotary.scale,
            "yarn": config.rope_scaling.factor if config.rope_scaling else None, "error": error,
            "neighbours": getattr(config, "rope_interleave", False)}


def experts(seen: Recorder, config) -> dict:
    """Which experts worked on the token that each step read: [expert, weight], in each layer that has experts."""
    layers, rows = sorted(seen.loads), list(seen.rows.values())
    E = len(seen.loads[layers[0]])
    found = {"layers": layers, "E": E, "A": config.num_experts_per_tok, "shared": shared_experts(config),
             "groups": getattr(config, "n_group", 1), "best_groups": getattr(config, "topk_group", 1),
             "loads": [seen.loads[layer].tolist() for layer in layers],
             "chosen": [[[[expert, round(weight, 4)] for expert, weight in zip(
                 row.topk_ids[layer].tolist(), row.weights[layer].tolist())] for row in rows] for layer in layers]}
    gates = [seen.layers[layer].mlp.gate for layer in layers]
    if hasattr(gates[0], "e_score_correction_bias"):
        found["bias"] = [small_numbers(gate.e_score_correction_bias.detach()) for gate in gates]
    if len(layers) * len(rows) * E <= SCORES and rows:  # (layers, steps, E), in 65,535ths
        scores = torch.stack([row.scores[layers] for row in rows], 1)
        found["scores"] = packed((scores * 65535).round().to(torch.int32).to(torch.uint16))
    return found


def shared_experts(config) -> int:
    return getattr(config, "n_shared_experts", 0) or int(bool(getattr(config, "shared_expert_intermediate_size", 0)))


def cache(seen: Recorder, config) -> dict:
    """Numbers that are kept of each token and layer, against keys and values of all heads; and of latent attention
    what the last tokens left there, bytes (layers, tokens, R + P) as a share of each column's largest."""
    tensors, H = seen.cache.tensors, config.num_attention_heads
    numbers = sum(tensor.shape[2] * tensor.shape[4] for tensor in tensors)
    kept = {"numbers": numbers, "bytes": sum(t.shape[0] * t.shape[2] * t.shape[4] * t.itemsize for t in tensors),
            "every_head": 2 * H * getattr(config, "head_dim", 0)}
    if not hasattr(config, "kv_lora_rank"):
        return kept
    N, P, M = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    length, L = seen.cache.length, len(seen.layers)
    shown, first = sorted({0, L // 2, L - 1})[:LATENT_LAYERS], max(0, length - LATENTS)
    x = tensors[0][shown, 0, 0, first:length].float().cpu()
    x = x / x.abs().amax(1, keepdim=True).clamp(min=1e-9)
    return kept | {"every_head": H * (N + P + M), "R": config.kv_lora_rank, "P": P, "layers": shown, "first": first,
                   "tokens": length - first, "data": packed((x * 127).round().to(torch.int8)),
                   "forms": max(seen.forms.values(), default=None)}


def cost(seen: Recorder) -> dict:
    """[part, "prompt" or "answer", seconds], the rest of the time among them, and [part, bytes in all, bytes that one
    token reads]."""
    seconds = [[part, phase, spent] for (part, phase), spent in seen.seconds.items()]
    for phase, total in seen.total.items():
        known = sum(spent for _, where, spent in seconds if where == phase)
        seconds.append(["everything else", phase, max(total - known, 0)])
    return {"seconds": [[part, phase, round(spent, 6)] for part, phase, spent in seconds], "own": round(seen.own, 6),
            "total": {phase: round(total, 6) for phase, total in seen.total.items()}, "weights": weights(seen)}


def weights(seen: Recorder) -> list:
    """Part of the model, its bytes, and the bytes that one token reads of it."""
    config, out = seen.model.config, {}
    for name, weight in seen.model.named_parameters():
        part = ("draft layer" if name.startswith(f"model.layers.{config.num_hidden_layers}.") else
                "embedding" if "embed_tokens" in name else "head" if "lm_head" in name else
                "experts" if ".experts." in name else "attention" if "self_attn" in name else
                "router" if ".gate." in name else "norms" if "norm" in name else "MLP")
        share = config.num_experts_per_tok / max(map(len, seen.loads.values())) if part == "experts" else 1
        if part == "embedding" and not config.tie_word_embeddings:
            share = 1 / config.vocab_size  # one row
        if part == "draft layer" and not seen.drafts:
            share = 0
        every, one = out.get(part, (0, 0))
        out[part] = every + weight.nbytes, one + weight.nbytes * share
    if config.tie_word_embeddings:
        out["embedding, also the head"] = out.pop("embedding")
    return [[part, every, round(one)] for part, (every, one) in out.items()]


def what_matters(off: dict | None) -> dict | None:
    """heads (L, H, steps) and experts (layers, E, steps): the roots of chances, in two bytes each."""
    return off and {"whole": small_numbers(off["whole"], 5), "heads": packed(fine_roots(off["heads"])),
                    "experts": packed(fine_roots(off["experts"]))}
