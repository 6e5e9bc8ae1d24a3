"""Checks of deepseek_v3's exercises."""

import functools
import math
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_v3 import layers, mla as real_mla, model as real_model, moe as real_moe, yarn as real_yarn
from deepseek_v3.config import Config, Yarn

from .exercises import PACKAGES, ROOT
from .graft import Off
from .judge import Case, Check, fill, normal

BF16 = torch.bfloat16
D, H, N, P, M, R = 14, 3, 4, 6, 5, 8


@functools.cache
def embedded() -> Config:
    return Config.from_checkpoint(ROOT / "checkpoints" / PACKAGES["deepseek_v3"])


def config(**changes) -> Config:
    return replace(embedded(), **({
        "hidden_size": D, "num_attention_heads": H, "qk_nope_head_dim": N, "qk_rope_head_dim": P, "v_head_dim": M,
        "kv_lora_rank": R, "q_lora_rank": 10, "rope_scaling": None, "intermediate_size": 16} | changes))


def see(first: int, T: int, padding: list[int] | None = None) -> Tensor:
    return layers.attention_mask(first, T, torch.tensor(padding)[:, None] if padding else None, torch.device("cpu"))


def angles(T: int, seed: int) -> tuple[Tensor, Tensor]:
    turn = normal(1, 1, T, P // 2, seed=seed, scale=2)
    return turn.cos(), turn.sin()


# --- latents ---

class Cache:
    """A cache that holds latents already, and remembers what is written into it."""

    def __init__(self, latents: Tensor):
        self.latents, self.written, self.length, self.padding = latents, [], latents.shape[2], None

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        self.written.append((layer, *new))
        return [torch.cat((self.latents, new[0]), 2)]


def latents_cases() -> list[Case]:
    cases = []
    for n, (B, T, past, rank, interleave, tags) in enumerate((
            (2, 5, None, 10, True, ()), (2, 4, None, None, True, ("without q_lora_rank",)),
            (1, 3, None, 10, False, ("without rope_interleave",)), (1, 1, 4, 10, True, ("with a cache",)),
            (2, 3, 2, None, True, ("with a cache",)))):
        cos, sin = angles(T, n)
        cases.append(Case({"x": normal(B, T, D, seed=n), "_cos": cos, "_sin": sin, "_mask": see(past or 0, T),
                           "_past": None if past is None else normal(B, 1, past, R + P, seed=n + 30), "_rank": rank,
                           "_interleave": interleave}, tags))
    return cases


def mla_of(module: ModuleType, rank: int | None = 10, interleave: bool = True, dtype=torch.float32) -> nn.Module:
    return fill(module.Attention(config(q_lora_rank=rank, rope_interleave=interleave), 2), 5, dtype)


def run_latents(module: ModuleType, i: SimpleNamespace) -> tuple:
    attention = mla_of(module, i._rank, i._interleave)
    cache = None if i._past is None else Cache(i._past)
    out = attention(i.x, i._cos, i._sin, i._mask, cache)
    return out, [(part[0], part[1].shape) for part in cache.written] if cache else []


def wrong_latents(i: SimpleNamespace, turned="qk", norm="latent", paired="both", qnorm=True, qsplit="nope first",
                  ksplit="latent first", heads="right", joined="right", order="pair first") -> tuple:
    a = mla_of(real_mla, i._rank, i._interleave)
    if i._rank is None:
        q = a.q_proj(i.x)
    else:
        low = a.q_a_proj(i.x)
        q = a.q_b_proj(a.q_a_layernorm(low) if qnorm else low)
    if heads == "scrambled":
        q = q.view(len(i.x), H, -1, N + P)
    elif heads == "sizes exchanged":
        q = q.unflatten(-1, (N + P, H)).permute(0, 3, 1, 2)
    elif heads == "parts apart":  # all heads' N values, then all their P values
        q = torch.cat((q[..., :H * N].unflatten(-1, (H, N)), q[..., H * N:].unflatten(-1, (H, P))), -1).transpose(1, 2)
    else:
        q = q.unflatten(-1, (H, N + P)).transpose(1, 2)
    if qsplit == "nope first":
        q_nope, q_rope = q.split((N, P), -1)
    else:
        q_rope, q_nope = q.split((P, N), -1)
    kv = a.kv_a_proj_with_mqa(i.x)[:, None]
    if norm == "whole":
        kv = torch.cat((a.kv_a_layernorm(kv[..., :R]), F.rms_norm(kv[..., R:], (P,))), -1)
    if ksplit == "latent first":
        c, k_rope = kv.split((R, P), -1)
    else:
        k_rope, c = kv.split((P, R), -1)

    def pairs(y: Tensor) -> Tensor:
        return layers.deinterleave(y)

    def turn(y: Tensor, on: str) -> Tensor:
        return layers.rotate(y, i._cos, i._sin) if on in turned else y

    wants = i._interleave if paired not in ("always", "inverted") else paired == "always" or not i._interleave
    if order == "pair first":
        if wants and paired in ("both", "q", "always", "inverted"):
            q_rope = pairs(q_rope)
        if wants and paired in ("both", "k", "always", "inverted"):
            k_rope = pairs(k_rope)
        q_rope, k_rope = turn(q_rope, "q"), turn(k_rope, "k")
    else:
        q_rope, k_rope = turn(q_rope, "q"), turn(k_rope, "k")
        if wants:
            q_rope, k_rope = pairs(q_rope), pairs(k_rope)
    if norm in ("latent", "whole", "after the rotation"):
        c = a.kv_a_layernorm(c) if norm != "whole" else c
    if norm == "keys too":
        c, k_rope = a.kv_a_layernorm(c), F.rms_norm(k_rope, (P,))
    latents = torch.cat((c, k_rope) if joined == "right" else (k_rope, c), -1)
    cache, written = None if i._past is None else Cache(i._past), []
    if cache:
        (latents,) = cache.write(a.layer_idx, latents)
        written = [(part[0], part[1].shape) for part in cache.written]
    form = a.absorbed if a.absorbs(i.x.shape[1], latents.shape[2]) else a.expanded
    out = form(q_nope, q_rope, latents, i._mask)
    return a.o_proj(out.transpose(1, 2).flatten(2)), written


LATENTS = Check(latents_cases, run_latents, wrong_latents, [
    ({"turned": ""}, "nothing is rotated: q_rope and k_rope are, with cos and sin"),
    ({"turned": "k"}, "q_rope is not rotated"),
    ({"turned": "q"}, "k_rope is not rotated: it is rotated before it goes into the cache"),
    ({"paired": "none"}, "deinterleave is missing: DeepSeek pairs neighbors, and `rotate` turns half-split pairs"),
    ({"paired": "k"}, "q_rope does not go through deinterleave, and k_rope does: their dot product needs one order"),
    ({"paired": "q"}, "k_rope does not go through deinterleave, and q_rope does: their dot product needs one order"),
    ({"paired": "always"}, "deinterleave is applied always: only where self.rope_interleave"),
    ({"paired": "inverted"}, "rope_interleave is the wrong way round: deinterleave where it is True"),
    ({"order": "turn first"}, "deinterleave comes after the rotation: before it, so that the right pairs are turned"),
    ({"norm": "none"}, "the latent is not normed: self.kv_a_layernorm(c)"),
    ({"norm": "keys too"}, "the rotary key is normed too: only the latent c is"),
    ({"norm": "whole"}, "the rotary key is normed too: only the latent c is"),
    ({"qnorm": False}, "self.q_a_layernorm is missing between q_a_proj and q_b_proj"),
    ({"qsplit": "rope first"}, "each head's query has its N values without position first, then its P rotary ones"),
    ({"ksplit": "rope first"}, "kv_a_proj_with_mqa gives the R values of the latent first, then the P of the rotary "
                               "key"),
    ({"heads": "scrambled"}, "the heads are cut wrongly: unflatten(-1, (-1, N + P)) first, then transpose(1, 2); a "
                             "view as (B, H, T, ·) mixes tokens"),
    ({"heads": "sizes exchanged"}, "the heads are cut wrongly: unflatten(-1, (-1, N + P)), the size of a head last"),
    ({"heads": "parts apart"}, "the query is split before it is cut into heads: each head has its own N + P values"),
    ({"joined": "wrong"}, "the latents are joined in the wrong order: c (R) first, then k_rope (P)"),
], results=("the result", "what is written to the cache"), shape="(B, T, D)",
    errors={"no attribute 'q_proj'": "there is no q_proj where self.q_lora_rank is not None: self.q_a_proj, norm, "
                                     "self.q_b_proj",
            "no attribute 'q_a_": "there is no q_a_proj where self.q_lora_rank is None: self.q_proj",
            "no attribute 'q_b_": "there is no q_b_proj where self.q_lora_rank is None: self.q_proj",
            "same number of dimensions": "c and k_rope need the axis of their one head: (B, 1, T, ·), by [:, None]",
            "cannot access local variable": "the lines below use q_nope, q_rope and latents: give them these names",
            "referenced before assignment": "the lines below use q_nope, q_rope and latents: give them these names",
            "name 'q_nope' is not defined": "the lines below use q_nope, q_rope and latents: give them these names",
            "name 'q_rope' is not defined": "the lines below use q_nope, q_rope and latents: give them these names",
            "name 'latents' is not defined": "the lines below use q_nope, q_rope and latents: give them these names"})


# --- expanded, absorbed ---

def forms_cases() -> list[Case]:
    cases = []
    for n, (B, T, S, padding, dtype, tags) in enumerate((
            (2, 5, 5, None, torch.float32, ()), (2, 1, 6, None, torch.float32, ("for a single token",)),
            (1, 3, 7, None, torch.float32, ("with tokens in the cache (S > T)",)),
            (2, 4, 4, [1, 2], torch.float32, ("with padding",)), (2, 4, 4, None, BF16, ("in bfloat16",)))):
        cases.append(Case({"q_nope": normal(B, H, T, N, seed=n, dtype=dtype),
                           "q_rope": normal(B, H, T, P, seed=n + 20, dtype=dtype),
                           "latents": normal(B, 1, S, R + P, seed=n + 40, dtype=dtype),
                           "_mask": see(S - T, T, padding)}, tags))
    return cases


def form_of(module: ModuleType, dtype: torch.dtype) -> nn.Module:
    """With YaRN's part of the scale, so that 1 / sqrt(N + P) in place of self.scale is not right by accident."""
    attention = mla_of(module, dtype=dtype)
    attention.scale *= 1.3
    return attention


def run_form(name: str):
    def run(module: ModuleType, i: SimpleNamespace) -> Tensor:
        attention = form_of(module, i.latents.dtype)
        return getattr(attention, name)(i.q_nope, i.q_rope, i.latents, i._mask)
    return run


def wrong_form(i: SimpleNamespace, order="key first", rope=True, nope=True, heads="right", values="v", c="right",
               query="right", split="latent first", mask=True, scale="own", position="shared") -> Tensor:
    a = form_of(real_mla, i.latents.dtype)
    latent, k_rope = i.latents.split((R, P), -1)
    if split == "rope first":
        k_rope, latent = i.latents.split((P, R), -1)
    if c == "normed again":
        latent = a.kv_a_layernorm(latent)
    kv = a.kv_b_proj(latent[:, 0])
    if heads == "scrambled":
        kv = kv.view(len(kv), H, -1, N + M)
    elif heads == "sizes exchanged":
        kv = kv.unflatten(-1, (N + M, H)).permute(0, 3, 1, 2)
    elif heads == "parts apart":
        kv = torch.cat((kv[..., :H * N].unflatten(-1, (H, N)), kv[..., H * N:].unflatten(-1, (H, M))), -1)
        kv = kv.transpose(1, 2)
    else:
        kv = kv.unflatten(-1, (H, N + M)).transpose(1, 2)
    k_nope, v = kv.split((N, M), -1) if order == "key first" else reversed(kv.split((M, N), -1))
    q_nope, q_rope = i.q_nope, i.q_rope
    k_rope = k_rope.expand(-1, H, -1, -1)
    if position == "first head only":
        k_rope = torch.cat((k_rope[:, :1], k_rope[:, 1:] * 0), 1)
    q, k = [q_nope] * nope + [q_rope] * rope, [k_nope] * nope + [k_rope] * rope
    if query == "other order":
        q = q[::-1]
    a.scale = {"none": 1.0, "twice": a.scale ** 2, "root": (N + P) ** -0.5, "nope": N ** -0.5, "over": 1 / a.scale,
               "both": a.scale * (N + P) ** -0.5, "latents": (R + P) ** -0.5}.get(scale, a.scale)
    seen = i._mask if mask else torch.ones_like(i._mask)
    if values == "latent":
        return a.sdpa(torch.cat(q, -1), torch.cat(k, -1), latent.expand(-1, H, -1, -1), seen)
    if values == "whole":
        return a.sdpa(torch.cat(q, -1), torch.cat(k, -1), i.latents.expand(-1, H, -1, -1), seen)
    out = a.sdpa(torch.cat(q, -1), torch.cat(k, -1), v if values == "v" else k_nope, seen)
    return out.transpose(1, 2) if heads == "tokens first" else out


SHARED = [
    ({"order": "value first"}, "kv_b_proj holds for each head the key part (N) first, then the value (M)"),
    ({"rope": False}, "the rotary part is missing: a score is q_nope·k_nope + q_rope·k_rope"),
    ({"nope": False}, "the part without position is missing: a score is q_nope·k_nope + q_rope·k_rope"),
    ({"heads": "parts apart"}, "kv_b_proj is split before it is cut into heads: each head has its own N + M values"),
    ({"heads": "sizes exchanged"}, "the heads are cut wrongly: heads first, (-1, N + M), the size of one last"),
    ({"split": "rope first"}, "the latents hold c (R) first, then k_rope (P)"),
    ({"query": "other order"}, "query and key are joined in different orders: the part without position first in both"),
    ({"c": "normed again"}, "the latent is normed again: it was normed before it went into the cache"),
    ({"mask": False}, "the mask is not used: hand it to self.sdpa"),
    ({"scale": "none"}, "the scale is missing: self.sdpa multiplies by self.scale"),
    ({"scale": "twice"}, "the scale is applied twice: self.sdpa does it"),
    ({"scale": "both"}, "the scale is applied twice: self.sdpa does it"),
    ({"scale": "over"}, "the scores are divided by self.scale: multiply"),
    ({"scale": "root"}, "the scale is 1 / sqrt(N + P): self.scale also has the factor of YaRN, so use that"),
    ({"scale": "nope"}, "the scale is that of N values: a key has N + P, use self.scale"),
    ({"scale": "latents"}, "the scale is that of R + P values: the scores are those of N + P, so use self.scale"),
]
def after_expanded(module: ModuleType) -> str | None:
    """The other form has the same numbers, and is another exercise."""
    i = forms_cases()[0].copy()
    attention, called = mla_of(module), []
    attention.absorbed = lambda *_: called.append(True) or mla_of(real_mla).absorbed(*_)
    with torch.no_grad():
        attention.expanded(i.q_nope, i.q_rope, i.latents, i._mask)
    return "the numbers are right, and self.absorbed computed them: here each head gets keys and values of its own, " \
           "from self.kv_b_proj" if called else None


EXPANDED = Check(forms_cases, run_form("expanded"), wrong_form, [
    *SHARED,
    ({"heads": "scrambled"}, "the heads are cut wrongly: unflatten(-1, (-1, N + M)) first, then transpose(1, 2); a "
                             "view as (B, H, S, ·) mixes tokens"),
    ({"values": "k"}, "the values are the key parts: kv.split((N, M), -1) gives keys, then values"),
    ({"values": "latent"}, "the values are the latents: in this form each head has its own, made by kv_b_proj"),
    ({"position": "first head only"}, "only head 0 gets the rotary key: k_rope.expand(-1, H, -1, -1)"),
    ({"heads": "tokens first"}, "the result is (B, T, H, M), wanted is (B, H, T, M)"),
], shape="(B, H, T, M)", after=after_expanded, errors={
    "Sizes of tensors must match except in dimension": "the parts to be joined have different numbers of heads: "
                                                       "k_rope is one head, expand it to all",
    "mat1 and mat2": "kv_b_proj reads the R values of c alone: split the latents first"})


def after_absorbed(module: ModuleType) -> str | None:
    """Nothing of the size of keys may be rebuilt."""
    i = forms_cases()[2].copy()
    attention = mla_of(module)
    expanded = []
    attention.kv_b_proj.register_forward_pre_hook(lambda _, inputs: expanded.append(inputs[0].shape))
    attention.expanded = lambda *_: expanded.append("expanded") or mla_of(real_mla).expanded(*_)
    with torch.no_grad():
        attention.absorbed(i.q_nope, i.q_rope, i.latents, i._mask)
    if expanded:
        return "the numbers are right, and it is the expanded form: kv_b_proj rebuilds keys and values of every " \
               "token; fold its matrix into the query and the output instead"
    return None


def wrong_absorbed(i: SimpleNamespace, last=True, values="v", fold="right", key="right", swapped=False,
                   out="right", **others) -> Tensor:
    if others or (last and values == "v" and fold == "right" and key == "right" and not swapped and out == "right"):
        return wrong_form(i, values=values if values in ("k",) else "v", **others)
    a = form_of(real_mla, i.latents.dtype)
    W = a.kv_b_proj.weight.view(H, N + M, R)
    W_UK, W_UV = W.split((N, M), 1)
    q = torch.einsum("bhtn,hnr->bhtr", i.q_nope, W_UK)
    if fold == "first head":
        q = torch.einsum("bhtn,nr->bhtr", i.q_nope, W_UK[0])
    q_rope = i.q_rope
    latent, k_rope = i.latents.split((R, P), -1)
    whole = torch.cat((q, q_rope), -1)
    if key == "rope first":
        whole = torch.cat((q_rope, q), -1)
    value = {"v": latent, "whole": i.latents, "last": i.latents[..., -R:]}.get(values, latent)
    y = a.sdpa(whole, i.latents, value, i._mask)
    if not last:
        return y
    if out == "first head":
        return torch.einsum("bhtr,mr->bhtm", y, W_UV[0])
    return torch.einsum("bhtr,hmr->bhtm", y[..., :R], W_UV)


ABSORBED = Check(forms_cases, run_form("absorbed"), wrong_absorbed, [
    *SHARED,
    ({"last": False}, "W_UV is missing at the end: what comes out of self.sdpa are sums of latents (R), and each "
                      "head's value is W_UV times that (M)"),
    ({"last": False, "values": "whole"}, "the values are c and k_rope together, and W_UV is missing: the value is the "
                                         "latent alone, latents[..., :R]"),
    ({"values": "last"}, "the value is taken from the end of the latents: c are their first R values"),
    ({"key": "rope first"}, "the query has q_rope first, and the latents have c first: one order in both"),
    ({"fold": "first head"}, "the query of every head is folded with W_UK of head 0: each head has its own"),
    ({"out": "first head"}, "every head's output goes through W_UV of head 0: each head has its own"),
], shape="(B, H, T, M)", after=after_absorbed, errors={
    "einsum(): subscript i has size": "the matrix does not fit: each_head(x, W) computes x Wᵀ, so the query needs "
                                      "W_UK.mT (R, N) and the output W_UV (M, R), of latents[..., :R]",
    "subscript i has size": "the matrix does not fit: each_head(x, W) computes x Wᵀ, so the query needs W_UK.mT "
                            "(R, N) and the output W_UV (M, R), of latents[..., :R]"})


# --- deinterleave ---

def deinterleave_cases() -> list[Case]:
    return [Case({"x": normal(*shape, seed=n)}) for n, shape in enumerate(((2, 3, 5, 8), (1, 1, 1, 6), (4, 4, 4, 4),
                                                                          (2, 2)))]


def wrong_deinterleave(i: SimpleNamespace, order="right", axis=-1) -> Tensor:
    x = i.x
    half = x.shape[-1] // 2
    return {"right": lambda: torch.cat((x[..., 0::2], x[..., 1::2]), axis),
            "odd first": lambda: torch.cat((x[..., 1::2], x[..., 0::2]), axis),
            "interleave": lambda: torch.stack(x.chunk(2, -1), -1).flatten(-2),
            "halves": lambda: torch.cat((x[..., half:], x[..., :half]), axis),
            "as it is": lambda: x.clone(), "reversed": lambda: x.flip(-1),
            "pairs": lambda: x.unflatten(-1, (half, 2)), "pairs apart": lambda: x.unflatten(-1, (half, 2)).mT,
            "neighbors": lambda: x.unflatten(-1, (half, 2)).flip(-1).flatten(-2),
            "even only": lambda: x[..., 0::2], "signed": lambda: torch.cat((-x[..., 1::2], x[..., 0::2]), axis),
            "minus": lambda: torch.cat((x[..., 0::2], -x[..., 1::2]), axis)}[order]()


DEINTERLEAVE = Check(deinterleave_cases, lambda module, i: module.deinterleave(i.x), wrong_deinterleave, [
    ({"order": "odd first"}, "the odd places come first: 0 2 4 … and then 1 3 5 …"),
    ({"order": "interleave"}, "this is the inverse, which makes neighbors of halves: 0 2 4 … 1 3 5 … is wanted"),
    ({"order": "halves"}, "the halves are exchanged: take every second value, x[..., 0::2] and x[..., 1::2]"),
    ({"order": "as it is"}, "the order is unchanged: 0 2 4 … 1 3 5 … is wanted"),
    ({"order": "reversed"}, "the order is reversed: 0 2 4 … 1 3 5 … is wanted"),
    ({"order": "neighbors"}, "neighbors are exchanged: 0 2 4 … 1 3 5 … is wanted"),
    ({"order": "pairs"}, "the pairs have an axis of their own: transpose them and flatten"),
    ({"order": "pairs apart"}, "the two halves have an axis of their own: flatten the last two"),
    ({"order": "even only"}, "only the even places come back: the odd ones follow"),
    ({"order": "signed"}, "this turns pairs: here values only change places, without a minus"),
    ({"order": "minus"}, "there is a minus: values only change places"),
    ({"axis": -2}, "torch.cat runs over the tokens: dim=-1"),
    ({"axis": 0}, "torch.cat runs over the first axis: dim=-1"),
    ({"axis": 1}, "torch.cat runs over axis 1: dim=-1"),
])


# --- yarn ---

def yarn_cases() -> list[Case]:
    def case(pairs: int, theta: float, tags=(), meta=False, **fields) -> Case:
        period = theta ** (torch.arange(pairs, dtype=torch.float32) / pairs)
        return Case({"_period": period, "_theta": theta, "_scaling": Yarn(**fields), "_meta": meta}, tags)

    trained = {"original_max_position_embeddings": 4096}
    return [case(32, 10000.0, factor=40.0, **trained, mscale=1.0, mscale_all_dim=1.0),
            case(16, 10000.0, factor=4.0, original_max_position_embeddings=512),
            case(32, 50000.0, factor=8.0, **trained, beta_fast=20.0, beta_slow=2.0, attention_factor=1.5),
            case(32, 10000.0, ("with truncate False",), factor=40.0, **trained, truncate=False),
            case(8, 10000.0, ("where low and high are one pair",), factor=4.0, original_max_position_embeddings=6,
                 beta_fast=1.2, beta_slow=1.1),
            case(8, 10000.0, ("where the ramp ends after the last pair",), factor=4.0,
                 original_max_position_embeddings=10 ** 5),
            case(8, 10000.0, ("where the ramp ends after the last pair",), factor=4.0,
                 original_max_position_embeddings=10 ** 5, beta_slow=1e-4),
            case(16, 10000.0, ("on the meta device",), True, factor=4.0, original_max_position_embeddings=512)]


def run_yarn(module: ModuleType, i: SimpleNamespace) -> tuple:
    with torch.device("meta" if i._meta else "cpu"):
        return module.yarn(i._period, i._theta, i._scaling)


def wrong_yarn(i: SimpleNamespace, limits="right", ramp="right", blend="right", rounding="right", clamp=True, turn=True,
               log="theta", factor="right", bounds=True, step=True, half=1.0, base="right", everywhere=True) -> tuple:
    s, n = i._scaling, len(i._period)
    size = 2 * n * half

    def pair(times: float) -> float:
        original = s.original_max_position_embeddings * (s.factor if base == "stretched" else 1)
        turns = original / (times * (2 * math.pi if turn else 1))
        below = {"once": math.log(i._theta), "10": 2 * math.log10(i._theta)}.get(log, 2 * math.log(i._theta))
        return size * (math.log10(turns) if log == "10 above" else math.log(turns)) / below

    fast, slow = (s.beta_slow, s.beta_fast) if limits == "exchanged" else (s.beta_fast, s.beta_slow)
    if limits == "default":
        fast, slow = 32.0, 1.0
    low, high = pair(fast), pair(slow)
    if rounding == "right" and s.truncate or rounding == "always":
        low, high = math.floor(low), math.ceil(high)
    elif rounding == "nearest" and s.truncate:
        low, high = round(low), round(high)
    elif rounding == "down" and s.truncate:
        low, high = math.floor(low), math.floor(high)
    elif rounding == "inward" and s.truncate:
        low, high = math.ceil(low), math.floor(high)
    if bounds:
        low = low if bounds == "high alone" else max(low, 0)
        high = high if bounds == "low alone" else min(high, 2 * n - 1)
    if bounds == "pairs":
        high = min(high, n - 1)
    if step and low == high:
        high += 0.001
    j = torch.arange(n, dtype=torch.float32)
    r = (j - low) / (high - low)
    r = r.clamp(0, 1) if clamp else r
    r = {"right": r, "inverted": 1 - r, "hard": (r > 0.5).float(), "smooth": r * r * (3 - 2 * r),
         "all": torch.ones(n), "none": torch.zeros(n)}[ramp]
    p = i._period
    by = {"right": s.factor, "times": 1 / s.factor, "root": s.factor ** 0.5}.get(factor, s.factor)
    frequencies = {"right": 1 / (by * p) * r + 1 / p * (1 - r), "periods": 1 / (by * p * r + p * (1 - r)),
                   "upside down": 1 / (1 / (by * p) * r + 1 / p * (1 - r)),
                   "no original": 1 / (by * p) * r, "as periods": by * p * r + p * (1 - r),
                   "geometric": (1 / (by * p)) ** r * (1 / p) ** (1 - r), "sum": 1 / (by * p) + 1 / p}[blend]
    if i._meta and not everywhere:
        frequencies = frequencies.to("meta")
    tail = real_yarn.yarn(p, i._theta, s)[1]
    return frequencies, tail


def explain_yarn(a: object, b: object, case: Case) -> str | None:
    if isinstance(a, tuple) and isinstance(a[0], Tensor) and a[0].is_meta:
        return 'on the meta device the numbers are lost: create the ramp with device="cpu"'
    if isinstance(a, tuple) and isinstance(a[0], Tensor) and a[0].shape == b[0].shape and a[0].dtype == b[0].dtype:
        s = case.inputs["_scaling"]
        j = int((~torch.isclose(a[0], b[0], 1e-4)).nonzero()[0])
        plain = 1 / case.inputs["_period"][j].item()
        return (f"pair {j} of {len(a[0])} gets {a[0][j].item() / plain:.3g} of its speed, right is "
                f"{b[0][j].item() / plain:.3g} (factor {s.factor:g}, trained on {s.original_max_position_embeddings} "
                f"tokens, theta {case.inputs['_theta']:g})")
    return None


YARN = Check(yarn_cases, run_yarn, wrong_yarn, [
    ({"everywhere": False}, 'on the meta device the numbers are lost: create the ramp with device="cpu"'),
    ({"ramp": "inverted"}, "the ramp is upside down: fast pairs (low j) keep their speed, slow ones are slowed"),
    ({"limits": "exchanged"}, "beta_fast and beta_slow are exchanged: low belongs to beta_fast, high to beta_slow"),
    ({"limits": "default"}, "32 and 1 are written into the code: use scaling.beta_fast and scaling.beta_slow"),
    ({"ramp": "all"}, "every pair is slowed, the fast ones too: that is plain interpolation, YaRN's ramp is missing"),
    ({"ramp": "none"}, "no pair is slowed: where the ramp is 1 the frequency is divided by the factor"),
    ({"ramp": "hard"}, "it is a step: between low and high both frequencies are blended by the ramp"),
    ({"ramp": "smooth"}, "the ramp is a smooth curve: it is a straight line"),
    ({"clamp": False}, "the ramp is not limited to 0 … 1: clamp(0, 1)"),
    ({"blend": "periods"}, "periods are blended: blend the frequencies, 1/period and 1/(factor * period)"),
    *[({"blend": blend}, "these are periods: frequencies, 1/period, are wanted")
      for blend in ("as periods", "upside down")],
    ({"blend": "geometric"}, "the blend is of logarithms: it is a plain weighted mean of both frequencies"),
    ({"blend": "no original"}, "the pairs that keep their speed are lost: + 1/period * (1 - ramp)"),
    ({"blend": "sum"}, "both frequencies are added without the ramp"),
    ({"factor": "times"}, "the frequencies are multiplied by the factor: slower pairs have smaller frequencies"),
    ({"factor": "root"}, "the frequencies are divided by the root of the factor: by the factor itself"),
    ({"rounding": "never"}, "low and high are not rounded: down and up, where scaling.truncate"),
    ({"rounding": "always"}, "low and high are rounded always: only where scaling.truncate"),
    ({"rounding": "nearest"}, "low and high are rounded to the nearest pair: low down, high up"),
    ({"rounding": "down"}, "high is rounded down: it is rounded up"),
    ({"rounding": "inward"}, "low is rounded up and high down: the other way round"),
    ({"turn": False}, "2 pi is missing in the number of turns: original / (times * 2 pi)"),
    ({"log": "once"}, "the divisor is ln(theta): it is 2 ln(theta)"),
    *[({"log": log}, "a logarithm to base 10 is mixed with a natural one: math.log in both places")
      for log in ("10", "10 above")],
    ({"half": 0.5}, "N is the number of values, 2 * len(period), and len(period) was used"),
    ({"base": "stretched"}, "the turns are counted in the stretched context: in the trained one, "
                            "original_max_position_embeddings"),
    ({"bounds": False}, "low and high may lie outside: low at least 0, high at most N - 1"),
    ({"bounds": "high alone"}, "low may lie below 0: max(low, 0)"),
    ({"bounds": "low alone"}, "high may lie beyond the last value: min(high, N - 1)"),
    ({"bounds": "pairs"}, "high is limited to the number of pairs: it is at most N - 1"),
    ({"step": False}, "where low and high are equal it divides by zero: add 0.001 to high"),
], results=("the frequencies", "the factor"), gradient=False, explain=explain_yarn,
    errors={"name 'frequencies'": "the lines below return `frequencies`: give the result that name",
            "local variable 'frequencies'": "the lines below return `frequencies`: give the result that name",
            "expected device meta": 'on the meta device the numbers are lost: create the ramp with device="cpu"',
            "on device meta": 'on the meta device the numbers are lost: create the ramp with device="cpu"',
            "same device": 'on the meta device the numbers are lost: create the ramp with device="cpu"',
            "division by zero": "where low and high are equal it divides by zero: add 0.001 to high"})


# --- softmax_scale ---

def scale_cases() -> list[Case]:
    def yarn(**fields) -> Yarn:
        return Yarn(**({"factor": 40.0, "original_max_position_embeddings": 4096} | fields))

    return [Case({"_config": config(rope_scaling=scaling, qk_nope_head_dim=n, qk_rope_head_dim=p)}, tags)
            for scaling, n, p, tags in (
                (None, 4, 6, ("without YaRN",)), (yarn(mscale=1.0, mscale_all_dim=1.0), 128, 64, ("with YaRN",)),
                (yarn(mscale=0.707, mscale_all_dim=0.5), 16, 8, ("with YaRN",)),
                (yarn(), 16, 8, ("with YaRN and without mscale_all_dim",)),
                (yarn(mscale_all_dim=0.0), 16, 8, ("with YaRN and without mscale_all_dim",)),
                (yarn(mscale=1.0, mscale_all_dim=0.6), 16, 8, ("with YaRN",)),
                (yarn(mscale=1.0), 16, 8, ("with YaRN and without mscale_all_dim",)),
                (yarn(mscale_all_dim=0.8), 16, 8, ("with YaRN and without mscale",)))]


def wrong_scale(i: SimpleNamespace, size="both", power=2, m="all", root=True, up=False, kind=float):
    c = i._config
    n = {"both": c.qk_nope_head_dim + c.qk_rope_head_dim, "nope": c.qk_nope_head_dim, "rope": c.qk_rope_head_dim,
         "value": c.v_head_dim, "latent": c.kv_lora_rank + c.qk_rope_head_dim,
         "hidden": c.hidden_size // c.num_attention_heads, "D": c.hidden_size}[size]
    scale = (n ** 0.5 if up else n ** -0.5) if root else (n if up else 1 / n)
    s = c.rope_scaling
    if s and m == "whole" and s.mscale_all_dim:
        return (scale * real_yarn.mscale(s.factor, s.mscale_all_dim)) ** 2
    if s and m == "both" and not s.mscale:
        return scale
    if s and m == "mscale, if":
        scale *= real_yarn.mscale(s.factor, s.mscale) ** power if s.mscale else 1
    elif s and m == "always":
        scale *= real_yarn.mscale(s.factor, s.mscale_all_dim or 1.0) ** power
    elif s and s.mscale_all_dim and m != "ignored":
        factor = {"mscale": lambda: real_yarn.mscale(s.factor, s.mscale or 1.0), "factor": lambda: s.factor,
                  "one": lambda: real_yarn.mscale(s.factor, 1.0), "itself": lambda: s.mscale_all_dim,
                  "quotient": lambda: real_yarn.mscale(s.factor, s.mscale or 1) / real_yarn.mscale(
                      s.factor, s.mscale_all_dim),
                  "log": lambda: 0.1 * math.log(s.factor) + 1}.get(
                      m, lambda: real_yarn.mscale(s.factor, s.mscale_all_dim))()
        scale *= factor ** power
    return torch.tensor(scale) if kind is Tensor else scale


SCALE = Check(scale_cases, lambda module, i: module.softmax_scale(i._config), wrong_scale, [
    ({"size": "nope"}, "the scale is that of N values: a score is a dot product over N + P"),
    ({"size": "rope"}, "the scale is that of P values: a score is a dot product over N + P"),
    ({"size": "value"}, "the scale is that of a value's size: a score is a dot product over N + P"),
    ({"size": "latent"}, "the scale is that of R + P values: a score is that of a head, N + P, in either form"),
    ({"size": "hidden"}, "hidden_size / heads is not the size of a head here: N + P"),
    ({"size": "D"}, "the scale is that of hidden_size: a score is a dot product over N + P"),
    ({"root": False}, "the root is missing: 1 / sqrt(N + P)"),
    ({"up": True}, "it is upside down: 1 / sqrt(N + P)"),
    ({"m": "ignored"}, "with YaRN the factor mscale² is missing (or is 1 by accident: it is mscale(factor, m), in this "
                       "order)"),
    ({"m": "whole"}, "the square is taken of everything: only mscale is squared, 1 / sqrt(N + P) is not"),
    ({"m": "both"}, "the factor is left out where scaling.mscale is None or 0: scaling.mscale_all_dim alone decides"),
    ({"power": 1}, "mscale comes once: it belongs to query and key, so it is squared in the score"),
    ({"power": -2}, "it is divided by mscale²: multiply, so that the softmax becomes sharper"),
    ({"power": -1}, "it is divided by mscale: multiply by mscale²"),
    ({"power": 4}, "mscale comes four times: it belongs to query and key, so it is squared"),
    ({"power": 0.5}, "the root of mscale is taken: it is squared"),
    ({"m": "always"}, "without mscale_all_dim (None or 0) there is no factor"),
    *[({"m": m}, "scaling.mscale is used: it is scaling.mscale_all_dim") for m in ("mscale", "mscale, if")],
    ({"m": "one"}, "mscale is computed for m = 1: m is scaling.mscale_all_dim"),
    ({"m": "factor"}, "it is multiplied by the factor itself: by mscale(factor, mscale_all_dim) ** 2"),
    ({"m": "itself"}, "mscale_all_dim itself is the factor: it is the m in mscale(scaling.factor, m)"),
    ({"m": "quotient"}, "this is the quotient for cos and sin: the scale has mscale(factor, mscale_all_dim) ** 2"),
    ({"m": "quotient", "power": 1}, "this is the quotient for cos and sin: the scale has mscale(factor, "
                                    "mscale_all_dim) ** 2"),
], gradient=False, errors={
    "'float' and 'NoneType'": "scaling.mscale_all_dim may be None: there is no factor then",
    "'NoneType' and 'float'": "scaling.mscale_all_dim may be None: there is no factor then",
    "'NoneType' object has no attribute": "config.rope_scaling may be None: there is no factor then"})


# --- router ---

def router_cases() -> list[Case]:
    cases = []
    for seed, (n, E, A, groups, best, norm, factor, bias, dtype, tags) in enumerate((
            (11, 12, 3, 4, 2, True, 2.5, 0.3, torch.float32, ("with groups",)),
            (9, 6, 2, 1, 1, True, 1.5, 0.3, torch.float32, ("without groups",)),
            (9, 8, 3, 4, 2, False, 1.5, 0.3, torch.float32, ("with groups", "without norm_topk_prob")),
            (8, 8, 3, 2, 1, True, 1.0, -2.0, torch.float32, ("with groups", "where every score with bias is negative")),
            (1, 8, 2, 4, 1, True, 2.0, 0.2, torch.float32, ("with groups", "for a single token")),
            (40, 8, 3, 2, 1, True, 1.5, 0.3, BF16, ("with groups", "in bfloat16")))):
        shift = normal(E, seed=seed + 70, scale=abs(bias)) if bias > 0 else normal(E, seed=seed + 70, scale=0.1) + bias
        cases.append(Case({"x": normal(n, D, seed=seed, dtype=dtype, scale=1.5), "_bias": shift, "_dtype": dtype,
                           "_config": config(n_routed_experts=E, num_experts_per_tok=A, n_group=groups, topk_group=best,
                                             norm_topk_prob=norm, routed_scaling_factor=factor)}, tags))
    nothing = Case(cases[1].inputs | {}, ("where all scores are 0",))
    weight = v3_router(real_moe, nothing.copy()).weight.detach()
    nothing.inputs["x"] = -200 * torch.linalg.pinv(weight).sum(1).expand(2, D)  # so that each logit is -200
    return [*cases, nothing]


def v3_router(module: ModuleType, i: SimpleNamespace) -> nn.Module:
    router = fill(module.Router(i._config), 4)
    router.weight.data = router.weight.data.to(i._dtype)
    router.e_score_correction_bias = nn.Parameter(i._bias, requires_grad=False)
    return router


def wrong_v3_router(i: SimpleNamespace, score="sigmoid", bias="chooses", weigh="scores", norm="right", factor=True,
                    groups="right", worth="two", hide="inf", low=False, order="right", count="topk", kind="float32",
                    when="after") -> tuple:
    router, c = v3_router(real_moe, i), i._config
    logits = (i.x @ router.weight.T).float() if low else router.logits(i.x)
    scores = {"sigmoid": logits.sigmoid(), "softmax": logits.softmax(-1), "none": logits,
              "relu": logits.relu()}[score]
    choice = scores if bias in ("none", "weighs only") else scores + router.e_score_correction_bias
    if bias == "minus":
        choice = scores - router.e_score_correction_bias
    elif bias == "before":
        choice = scores = (logits + router.e_score_correction_bias).sigmoid()
    elif bias == "on logits":
        choice = (logits + router.e_score_correction_bias).sigmoid()
    if c.n_group > 1 and groups != "ignored":
        if groups == "strided":
            parts = choice.unflatten(-1, (-1, c.n_group)).mT
        else:
            parts = choice.unflatten(-1, (c.n_group, -1))
        source = parts
        if groups == "by scores":
            source = scores.unflatten(-1, (c.n_group, -1))
        value = {"two": lambda: source.topk(2).values.sum(-1), "one": lambda: source.amax(-1),
                 "mean": lambda: source.mean(-1),
                 "least": lambda: source.topk(2).values[..., 1]}[worth]()
        keep = {"topk": c.topk_group, "all but": max(c.n_group - c.topk_group, 1), "one": 1,
                "A": min(c.num_experts_per_tok, c.n_group)}[count]
        allowed = torch.zeros_like(value).scatter(
            1, value.topk(keep, largest=groups != "worst").indices, 1).bool()
        filled = parts.masked_fill(~allowed[..., None], {"inf": -torch.inf, "zero": 0.0, "one": -1.0}[hide])
        if hide == "inverted":
            filled = parts.masked_fill(allowed[..., None], -torch.inf)
        choice = filled.mT.flatten(1) if groups == "strided" else filled.flatten(1)
    ids = choice.topk(c.num_experts_per_tok, largest=order != "smallest").indices
    weights = {"scores": scores, "choice": scores + router.e_score_correction_bias,
               "logits": logits}[weigh].gather(1, ids)
    if bias == "weighs only":
        weights = (scores + router.e_score_correction_bias).gather(1, ids)
    if norm == "before" or norm == "before, if" and c.norm_topk_prob:
        weights = (scores / scores.sum(-1, keepdim=True)).gather(1, ids)
    scaled = when == "before"
    weights = weights * c.routed_scaling_factor if scaled and factor else weights
    if norm == "all" and c.norm_topk_prob:
        weights = weights / weights.sum()
    elif (norm == "right" and c.norm_topk_prob) or norm == "always" or (norm == "inverted" and not c.norm_topk_prob):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    elif norm == "softmax" and c.norm_topk_prob:
        weights = weights.softmax(-1)
    elif norm == "bare" and c.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    elif norm == "tokens" and c.norm_topk_prob:
        weights = weights / (weights.sum(0, keepdim=True) + 1e-20)
    if factor == "only normed":
        weights = weights * (c.routed_scaling_factor if c.norm_topk_prob else 1)
    elif factor == "divides":
        weights = weights / c.routed_scaling_factor
    elif factor and not scaled:
        weights = weights * c.routed_scaling_factor
    weights = weights if kind == "float32" else weights.to(i.x.dtype)
    return (ids, weights) if order == "exchanged" else (weights, ids)


def by_expert(result: object) -> object:
    """The order of the chosen means nothing here: sorted by their numbers."""
    if not (isinstance(result, tuple | list) and len(result) == 2 and all(
            isinstance(x, Tensor) and x.ndim == 2 for x in result)):
        return result
    weights, ids = result
    if ids.is_floating_point() or weights.shape != ids.shape:
        return tuple(result)
    ids, places = ids.sort(-1)
    return weights.gather(1, places), ids


def explain_v3_router(a: object, b: object, case: Case) -> str | None:
    if isinstance(a, tuple | list) and len(a) == 2 and all(isinstance(x, Tensor) for x in a):
        if not a[0].is_floating_point() and a[1].is_floating_point():
            return "the results are exchanged: weights first, then ids"
        if a[0].dtype != b[0].dtype:
            return f"the weights are {str(a[0].dtype)[6:]}: they stay float32, whatever x is"
        if a[1].shape == b[1].shape and not torch.equal(a[1], b[1]):
            t = int((a[1] != b[1]).any(-1).nonzero()[0])
            c = case.inputs["_config"]
            return f"token {t} goes to the experts {a[1][t].tolist()}, right are {b[1][t].tolist()} (n_group " \
                   f"{c.n_group}, topk_group {c.topk_group}, {c.n_routed_experts} experts)"
    return None


ROUTER = Check(router_cases, lambda module, i: by_expert(v3_router(module, i)(i.x)),
               lambda i, **options: by_expert(wrong_v3_router(i, **options)), [
    ({"weigh": "choice"}, "the bias weighs too: it only chooses, the weights are gathered from the scores without it"),
    ({"bias": "none"}, "the bias is not used: self.e_score_correction_bias is added to the scores that choose"),
    ({"bias": "minus"}, "the bias is subtracted: add it to the scores that choose"),
    ({"bias": "before"}, "the bias is added before the sigmoid: it is added to the scores, and only chooses"),
    ({"bias": "on logits"}, "the bias is added before the sigmoid: it is added to the scores"),
    ({"bias": "weighs only"}, "the bias weighs and does not choose: the other way round"),
    ({"score": "softmax"}, "a softmax stands in place of the sigmoid: in DeepSeek-V3 each score stands for itself"),
    ({"score": "none"}, "the sigmoid is missing"),
    ({"weigh": "logits"}, "the weights are logits: they are gathered from the scores, after the sigmoid"),
    ({"norm": "never"}, "with norm_topk_prob the chosen weights are divided by their sum"),
    ({"norm": "always"}, "the weights are divided by their sum always: only where self.norm_topk_prob is set"),
    ({"norm": "inverted"}, "norm_topk_prob is the wrong way round"),
    ({"norm": "all"}, "the weights are divided by the sum over all tokens: by each token's own (dim=-1)"),
    *[({"norm": norm}, "the scores are divided by the sum over all experts: by the sum of the chosen ones")
      for norm in ("before", "before, if")],
    ({"norm": "bare"}, "where all scores are 0 it is 0/0: divide by the sum + 1e-20"),
    ({"norm": "softmax"}, "a softmax runs over the chosen weights: divide them by their sum"),
    ({"norm": "tokens"}, "the weights are divided by the sum over the tokens: by each token's own (dim=-1)"),
    ({"when": "before"}, "the factor comes before the division by the sum, which takes it out again: multiply at the "
                         "end"),
    ({"factor": False}, "self.routed_scaling_factor is missing: it multiplies the weights at the end"),
    ({"factor": "only normed"}, "routed_scaling_factor multiplies in any case, with norm_topk_prob and without"),
    ({"factor": "divides"}, "the weights are divided by routed_scaling_factor: multiply"),
    ({"groups": "ignored"}, "the groups are not used: only experts of the best topk_group groups can be chosen"),
    ({"worth": "one"}, "a group is judged by its best expert: by the sum of its two best"),
    ({"worth": "mean"}, "a group is judged by all its experts: by the sum of its two best"),
    ({"worth": "least"}, "a group is judged by its second best: by the sum of its two best"),
    ({"groups": "strided"}, "the groups are cut wrongly: experts 0, 1, 2, … form the first, neighbors together"),
    ({"groups": "by scores"}, "the groups are judged without the bias: their worth is that of scores + bias"),
    ({"groups": "worst"}, "the worst groups are kept: the best ones"),
    ({"hide": "zero"}, "experts of other groups get 0, and where a bias makes the allowed ones negative, 0 wins: -inf"),
    ({"hide": "one"}, "experts of other groups get -1, which may be more than an allowed one: -inf"),
    ({"hide": "inverted"}, "the best groups are hidden: the others are"),
    ({"count": "one"}, "only one group is kept: self.topk_group of them"),
    ({"count": "A"}, "num_experts_per_tok groups are kept: self.topk_group of them"),
    ({"order": "smallest"}, "the worst experts are chosen: topk takes the largest"),
    ({"order": "exchanged"}, "the results are exchanged: weights first, then ids"),
    ({"kind": "x"}, "the weights have the type of x: they stay float32"),
    ({"low": True}, "the logits are computed in bfloat16: self.logits(x) does it in float32"),
], results=("the weights", "the ids"), shape="(n, A)", explain=explain_v3_router)


# --- bias_update ---

def bias_cases() -> list[Case]:
    cases = []
    for n, (tokens, E, A, speed) in enumerate(((20, 6, 2, 0.001), (9, 5, 3, 0.1), (8, 4, 2, 0.01), (30, 8, 2, 0.5))):
        scores = normal(tokens, E, seed=n) + torch.linspace(1, -1, E)
        scores[:, -1] = -9
        ids = scores.topk(A).indices
        if n == 2:  # two experts exactly at the mean
            ids = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1], [0, 2], [0, 1], [2, 0], [2, 3]])
        if n == 1:  # a mean of 5.4, and two experts with 5
            ids = torch.tensor([[0, 1, 2]] * 4 + [[0, 1, 3]] + [[0, 3, 2]] * 4)
        cases.append(Case({"bias": normal(E, seed=n + 9, scale=0.1), "topk_ids": ids, "_speed": speed}))
    return cases


def wrong_bias(i: SimpleNamespace, sign=1, how="sign", against="mean", count="all", speed=True, back="new", busy="both",
               forget=False) -> Tensor:
    E, ids = len(i.bias), i.topk_ids
    chosen = ids[:, 0] if count == "first" else ids.flatten()
    counts = torch.bincount(chosen, minlength=0 if forget else E).float()
    if count == "share":
        counts = counts / ids.numel()
    if count == "distinct":
        counts = (counts > 0).float()
    middle = {"mean": counts.mean(), "floor": counts.mean().floor(), "used": counts[counts > 0].mean(),
              "median": counts.median(), "tokens": torch.tensor(len(ids) / E),
              "zero": torch.tensor(0.0), "even": torch.tensor(1 / E), "largest": counts.max(),
              "whole": torch.tensor(float(ids.numel()))}[against]
    off = middle - counts
    step = {"sign": off.sign(), "plain": off, "share": off / middle.clamp(min=1e-9), "tanh": off.tanh(),
            "step": torch.where(off > 0, 1.0, -1.0), "step up": torch.where(off >= 0, 1.0, -1.0),
            "share of all": off / ids.numel()}[how]
    if busy == "down":
        step = step.clamp(max=0)
    elif busy == "up":
        step = step.clamp(min=0)
    step = sign * step * (i._speed if speed else 1)
    return {"new": i.bias + step, "step": step, "scaled": i.bias * (1 + step), "minus": step - i.bias}[back]


BIAS = Check(bias_cases, lambda module, i: module.bias_update(i.bias, i.topk_ids, i._speed), wrong_bias, [
    ({"sign": -1}, "the sign is the wrong way round: a busy expert's bias goes down, an idle one's up"),
    ({"how": "plain"}, "the step grows with the distance from the mean: only its direction counts, torch.sign"),
    ({"how": "share"}, "the step grows with the distance from the mean: only its direction counts, torch.sign"),
    ({"how": "share of all"}, "the step grows with the distance from the mean: only its direction counts, torch.sign"),
    ({"how": "tanh"}, "this is tanh: the step is the sign, always of one size"),
    ({"how": "step"}, "an expert exactly at the mean is moved: torch.sign gives 0 there"),
    ({"how": "step up"}, "an expert exactly at the mean is moved: torch.sign gives 0 there"),
    ({"against": "median"}, "the counts are compared with their median: with their mean"),
    ({"against": "floor"}, "the mean is cut to an integer: / and not //"),
    ({"against": "used"}, "the mean is that of the experts that were chosen: of all E, those with 0 too"),
    ({"against": "tokens"}, "the counts are compared with n/E: the mean is n·A/E, as each token has A choices"),
    ({"against": "even"}, "counts are compared with 1/E, which is a share: compare with the mean count"),
    ({"against": "zero"}, "the counts are compared with 0: with their mean"),
    ({"against": "largest"}, "the counts are compared with the largest: with their mean"),
    ({"against": "whole"}, "the counts are compared with the number of all choices: with their mean"),
    ({"count": "first"}, "only the first choice of each token is counted: all A of them"),
    ({"speed": False}, "`speed` is not used: it is the size of the step"),
    ({"back": "step"}, "only the step comes back: return bias + step"),
    ({"back": "scaled"}, "the bias is multiplied: the step is added"),
    ({"busy": "down"}, "only busy experts are moved: the idle ones go up"),
    ({"busy": "up"}, "only idle experts are moved: the busy ones go down"),
    ({"forget": True}, "an expert that nobody chose is forgotten: torch.bincount needs minlength=len(bias)"),
    ({"count": "distinct"}, "it is counted whether an expert was chosen, and not how often"),
], shape="(E,)", gradient=False, errors={
    "must match the size": "an expert that nobody chose is forgotten: torch.bincount needs minlength=len(bias)",
    "bincount only supports 1-d": "all choices are counted in one row: topk_ids.flatten()",
    "mean(): could not infer": "counts are integers: .float() before the mean"})


# --- mtp_join ---

def join_cases() -> list[Case]:
    return [Case({"embedded": normal(B, T, D, seed=n, scale=0.3, dtype=dtype), "hidden": normal(
        B, T, D, seed=n + 30, scale=2, dtype=dtype)}, tags) for n, (B, T, dtype, tags) in enumerate((
            (2, 5, torch.float32, ()), (1, 1, torch.float32, ("for a single token",)), (3, 2, BF16, ("in bfloat16",))))]


def join_of(module: ModuleType, dtype: torch.dtype) -> nn.Module:
    c = config(first_k_dense_replace=9)
    with torch.random.fork_rng(devices=[]):
        layer = module.MTPLayer(c, 3)
    return fill(layer, 8, dtype)


def wrong_join(i: SimpleNamespace, order="embedding first", enorm=True, hnorm=True, norms="own", project=True,
               how="cat") -> Tensor:
    layer = join_of(real_model, i.embedded.dtype)
    e, h = (layer.hnorm, layer.enorm) if norms == "exchanged" else (layer.enorm, layer.hnorm)
    if norms == "one":
        h = e
    a, b = e(i.embedded) if enorm else i.embedded, h(i.hidden) if hnorm else i.hidden
    if how == "add":
        return layer.eh_proj(torch.cat((a + b, a + b), -1))
    if how == "sum":
        return a + b
    if how.startswith("residual"):
        return (i.hidden if how.endswith("state") else i.embedded) + layer.eh_proj(torch.cat((a, b), -1))
    if how == "same":
        return layer.eh_proj(torch.cat((a, a), -1))
    x = torch.cat((a, b) if order == "embedding first" else (b, a), -1)
    if how == "mixed":
        x = torch.stack((a, b), -1).flatten(-2)
    return layer.eh_proj(x) if project else x


JOIN = Check(join_cases, lambda module, i: join_of(module, i.embedded.dtype).join(i.embedded, i.hidden), wrong_join, [
    ({"order": "hidden first"}, "hidden comes first, as in eq. 21 of the paper: the released weights want the "
                                "embedding first"),
    ({"enorm": False, "hnorm": False}, "both norms are missing: self.enorm on the embedding, self.hnorm on the state"),
    ({"enorm": False}, "self.enorm is missing: the embedding is normed"),
    ({"hnorm": False}, "self.hnorm is missing: the state is normed too, by the draft layer's own norm"),
    ({"norms": "exchanged"}, "the norms are exchanged: enorm belongs to the embedding, hnorm to the state"),
    ({"norms": "exchanged", "order": "hidden first"}, "norms and order are exchanged: enorm(embedded) first, then "
                                                      "hnorm(hidden)"),
    ({"norms": "one"}, "the state goes through self.enorm: its norm is self.hnorm"),
    ({"project": False}, "self.eh_proj is missing: it makes D values of the 2 D"),
    ({"how": "sum"}, "the two are added: put them side by side (torch.cat), and project"),
    ({"how": "residual"}, "the embedding is added to the result: the projection alone is wanted"),
    ({"how": "residual, state"}, "the state is added to the result: the projection alone is wanted"),
    ({"how": "same"}, "the embedding stands there twice: embedding and state"),
    ({"how": "mixed"}, "the values alternate: torch.cat puts one after the other"),
], shape="(B, T, D)", errors={
    "cannot be multiplied": "eh_proj wants 2 D values: torch.cat((…, …), dim=-1)",
    "inconsistent tensor size": "eh_proj wants 2 D values: torch.cat((…, …), dim=-1)"})


# --- verify ---

TRUTH, GUESS = [0.5, 0.25, 0.05, 0.2], [0.1, 0.45, 0.3, 0.15]
DRAWS = 1200  # for each draft: a share is then within 0.06 of the probability (four standard deviations)


def verify_cases() -> list[Case]:
    even = [0.25, 0.25, 0.25, 0.25]
    return [Case({"_truth": torch.tensor(truth), "_guess": torch.tensor(guess), "_drafted": drafted}, tags)
            for truth, guess, drafted, tags in (
                *((TRUTH, GUESS, d, ()) for d in (1, 2, 0)),
                (even, even, 2, ("where truth and guess are equal",)),
                ([0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], 1, ("in greedy decoding",)),
                ([0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], 2, ("in greedy decoding",)))]


def run_verify(module: ModuleType, i: SimpleNamespace) -> tuple:
    generator = torch.Generator().manual_seed(7)
    counts = [0] * 4
    before = torch.get_rng_state()
    given = i._truth.clone(), i._guess.clone()
    for _ in range(DRAWS):
        token = module.verify(i._truth, i._guess, i._drafted, generator)
        for name, was, tensor in zip(("truth", "guess"), given, (i._truth, i._guess)):
            if not torch.equal(was, tensor):  # now, since it spoils what follows
                raise Off(f"it changes {name}, which it was given: make a new tensor instead of writing into that one")
        if isinstance(token, Tensor) and token.numel() == 1:
            raise Off("it returns a tensor: an int is wanted, int(…)")
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 4:
            raise Off(f"it returns {token!r:.40}: wanted is the id of a token, an int" if token is not None else
                      "it returns nothing: the id of a token on every path")
        counts[token] += 1
    if not torch.equal(before, torch.get_rng_state()):
        raise Off("random numbers are drawn without the generator: with one seed the answer would change from run to "
                  "run")
    again, found = [torch.Generator().manual_seed(9) for _ in range(2)], []
    for generator in again:
        found.append([module.verify(i._truth, i._guess, i._drafted, generator) for _ in range(100)])
    if found[0] != found[1]:  # Python's own random numbers, for example
        raise Off("with the same generator other tokens come: all random numbers have to be drawn from `generator`")
    return (torch.tensor(counts) / DRAWS,)


def exact_verify(i: SimpleNamespace, keep="ratio", rest="missing") -> tuple:
    """The probabilities, which every right way of drawing has; options for wrong ones."""
    p, q, d = i._truth.double(), i._guess.double(), i._drafted
    a = {"ratio": min(1, p[d] / q[d]), "always": 1.0, "never": 0.0, "truth": p[d], "guess": q[d],
         "inverse": min(1, q[d] / max(p[d], 1e-12)), "larger": float(p[d] >= q[d]),
         "difference": min(1, abs(p[d] - q[d])),
         "half": 0.5, "likeliest": float(p.argmax() == d), "product": p[d] * q[d],
         "one minus": 1 - min(1, p[d] / q[d])}[keep]
    missing = (p - q).clamp(min=0)
    r = {"missing": missing if missing.any() else p, "truth": p, "guess": q, "absolute": (p - q).abs(),
         "surplus": (q - p).clamp(min=0), "likeliest": F.one_hot(p.argmax(), 4).double(),
         "even": torch.ones(4).double(),
         "others": p.masked_fill(torch.arange(4) == d, 0), "softmax": (p - q).softmax(-1)}[rest]
    r = p if not r.any() else r
    out = (1 - float(a)) * r / r.sum()
    out[d] += float(a)
    return (out.float(),)


def within_chance(a: tuple, b: tuple) -> bool:
    return bool(((a[0] - b[0]).abs() < 0.06).all())


VERIFY_MISTAKES = [
    ({"keep": "always"}, "the draft is always kept: with probability min(1, truth/guess) of it"),
    ({"keep": "never"}, "the draft is never kept as such: with probability min(1, truth/guess) it is"),
    ({"keep": "never", "rest": "truth"}, "the draft is never kept as such, the token is just drawn from the truth: "
                                         "right in the mean, and no draft is used"),
    ({"keep": "inverse"}, "the ratio is upside down: keep with probability min(1, truth/guess)"),
    ({"keep": "larger"}, "the draft is kept only where truth >= guess: otherwise still with probability truth/guess"),
    ({"keep": "larger", "rest": "truth"}, "the draft is kept only where truth >= guess, and else drawn from the truth: "
                                          "keep with probability truth/guess, and draw from (truth - guess) above 0"),
    ({"keep": "truth"}, "the draft is kept with probability truth: divide by the guess, min(1, truth/guess)"),
    ({"keep": "truth", "rest": "truth"}, "the draft is kept with probability truth: min(1, truth/guess), and else "
                                         "draw from (truth - guess) above 0"),
    ({"keep": "guess"}, "the draft is kept with probability guess: min(1, truth/guess)"),
    ({"keep": "likeliest"}, "the draft is kept only where it is the model's likeliest token: with probability "
                            "min(1, truth/guess), whichever it is"),
    ({"keep": "likeliest", "rest": "truth"}, "the draft is kept only where it is the model's likeliest token: with "
                                             "probability min(1, truth/guess), whichever it is"),
    ({"keep": "likeliest", "rest": "likeliest"}, "this is greedy decoding: with probabilities, keep by chance and "
                                                 "draw"),
    ({"keep": "one minus"}, "the draft is rejected with the probability with which it is to be kept: the comparison is "
                            "the wrong way round"),
    ({"keep": "difference"}, "the draft is kept with probability |truth - guess|: min(1, truth/guess)"),
    ({"keep": "half"}, "the draft is kept with probability 1/2: min(1, truth/guess)"),
    ({"keep": "product"}, "the draft is kept with probability truth * guess: min(1, truth/guess)"),
    ({"rest": "truth"}, "after a rejection it is drawn from the truth, so that what the draft covers comes too often: "
                        "draw from (truth - guess), where that is above 0"),
    ({"rest": "guess"}, "after a rejection it is drawn from the guess: draw from (truth - guess) above 0"),
    ({"rest": "absolute"}, "after a rejection it is drawn from |truth - guess|: where the guess was too large nothing "
                           "is missing, so clamp at 0"),
    ({"rest": "surplus"}, "after a rejection it is drawn from (guess - truth): it is (truth - guess) that is missing"),
    ({"rest": "likeliest"}, "after a rejection one token is taken for certain (argmax): draw from (truth - guess) "
                            "above "
                          "0"),
    ({"rest": "even"}, "after a rejection it is drawn evenly: draw from (truth - guess) above 0"),
    ({"rest": "others"}, "after a rejection it is drawn from the truth without the draft: draw from (truth - guess) "
                         "above 0"),
    ({"rest": "softmax"}, "a softmax is taken over truth - guess: only clamp it at 0, draw does the rest"),
]


def explain_verify(a: object, b: object, case: Case) -> str | None:
    i = case.inputs
    if isinstance(a, tuple) and isinstance(a[0], Tensor):
        return (f"truth {[round(x, 2) for x in i['_truth'].tolist()]}, guess "
                f"{[round(x, 2) for x in i['_guess'].tolist()]}, draft {i['_drafted']}: the tokens come in shares of "
                f"{[round(x, 2) for x in a[0].tolist()]}, right are {[round(x, 2) for x in b[0].tolist()]}")
    return None


VERIFY = Check(verify_cases, run_verify, exact_verify, VERIFY_MISTAKES, gradient=False, explain=explain_verify,
               wanted=exact_verify, alike=within_chance,
               errors={"sum of probabilities <= 0": "where truth and guess are equal nothing is missing, and nothing "
                                                    "can be drawn from it: draw from the truth then",
                       "invalid multinomial distribution": "where truth and guess are equal nothing is missing, and "
                                                           "nothing can be drawn from it: draw from the truth then",
                       "encountered inf": "negative numbers are no probabilities: clamp (truth - guess) at 0",
                       "probability tensor contains": "negative numbers or 0/0 are no probabilities: clamp (truth - "
                                                      "guess) at 0, and draw from the truth where nothing is left"})

CHECKS = {"latents": LATENTS, "expanded": EXPANDED, "absorbed": ABSORBED, "deinterleave": DEINTERLEAVE, "yarn": YARN,
          "softmax_scale": SCALE, "router": ROUTER, "bias_update": BIAS, "mtp_join": JOIN, "verify": VERIFY}
