"""Checks of the exercises in qwen3/layers.py: inputs, and the usual mistakes written out."""

import functools
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3 import layers as real
from qwen3.config import Config, Yarn

from .exercises import PACKAGES, ROOT
from .graft import Off
from .judge import Case, Check, fill, normal

BF16, F16 = torch.bfloat16, torch.float16


@functools.cache
def embedded() -> Config:
    return Config.from_checkpoint(ROOT / "checkpoints" / PACKAGES["qwen3"])


def config(**changes) -> Config:
    return replace(embedded(), **changes)


# --- rms_norm ---

def rms_cases() -> list[Case]:
    def case(*shape, eps=1e-6, dtype=torch.float32, scale=1.0, seed=0, **more) -> Case:
        return Case({"x": normal(*shape, seed=seed, dtype=dtype, scale=scale), "_eps": eps,
                     "_weight": (1 + 0.4 * normal(shape[-1], seed=seed + 50)).to(dtype)}, **more)

    shifted = case(2, 5, 8, eps=0.3)
    shifted.inputs["x"] = 2 * shifted.inputs["x"] + 0.7
    return [shifted, case(4, 4, 4, eps=1e-3, seed=1), case(8, seed=2), case(3, 6, scale=1e-4, seed=3),
            case(2, 3, 2, 10, eps=0.05, seed=6),
            case(16, 64, dtype=F16, scale=1000, seed=5, tags=("in float16",), strict=True),
            case(96, 128, dtype=BF16, seed=4, tags=("in bfloat16",), strict=True)]


def run_rms(module: ModuleType, i: SimpleNamespace) -> Tensor:
    norm = module.RMSNorm(i._weight.numel(), i._eps)
    norm.weight = nn.Parameter(i._weight)
    return norm(i.x)


def wrong_rms(i: SimpleNamespace, size="rms", eps="inside", axis=-1, keep=True, root=True, divide=True, weight="after",
              rounding="before the weight") -> Tensor:
    x, w = i.x.float(), i._weight
    if weight == "first":
        x = x * w.float()
    centered = x - x.mean(-1, keepdim=True) if size == "layer norm" else x
    added = {"inside": i._eps, "1e-6": 1e-6, "1e-5": 1e-5}.get(eps, 0)
    square = {"sum": lambda: x.square().sum(axis, keepdim=keep), "mean²": lambda: x.mean(axis, keepdim=keep).square(),
              "abs": lambda: x.abs().mean(axis, keepdim=keep).square(),
              "deviation": lambda: x.var(axis, unbiased=False, keepdim=keep),
              "sample deviation": lambda: x.var(axis, keepdim=keep),
              "largest": lambda: x.abs().amax(axis, keepdim=keep).square()}.get(
                  size, lambda: centered.square().mean(axis, keepdim=keep))()
    below = (square + added).sqrt() if root else square + added
    below = below + i._eps if eps == "outside" else below
    y = (centered if size == "layer norm" else x) * (1 / below if divide else below)
    y = x if size == "not at all" else y
    if weight in ("missing", "first"):
        return y.to(i.x.dtype)
    if rounding == "after the weight":
        return (y * w.float()).to(i.x.dtype)
    y = y.to(i.x.dtype)
    return {"after": lambda: w * y, "plus": lambda: w + y, "one more": lambda: (1 + w) * y,
            "twice": lambda: w * w * y}[weight]()


def explain_rms(a: object, b: object, case: Case) -> str | None:
    if isinstance(a, Tensor) and a.dtype == torch.float32 and b.dtype != a.dtype:
        return f"it returns float32 for x in {str(b.dtype)[6:]}: round with .to(x.dtype) before the weight"
    if isinstance(a, Tensor) and a.shape == b.shape and case.strict:
        if not torch.isclose(a.double(), b.double(), 0.05, 0.05, equal_nan=True).all():
            return "the squares overflow (float16 ends at 65,504): compute in float32, x.float() comes first"
        return "it loses bits: compute in float32 (x.float() comes first), and round once, before the weight"
    return None


RMS = Check(rms_cases, run_rms, wrong_rms, [
    ({"rounding": "after the weight"}, "you round after multiplying by the weight: first .to(x.dtype), then the "
                                       "weight"),
    ({"weight": "first"}, "you normalize after multiplying by the weight: the weight comes last"),
    ({"weight": "missing"}, "self.weight is missing: multiply by it at the end"),
    ({"weight": "plus"}, "the weight is added: multiply by it"),
    ({"weight": "one more"}, "you multiply by 1 + weight, as Gemma does: Qwen3 multiplies by the weight itself"),
    ({"weight": "twice"}, "the weight is multiplied in twice"),
    ({"size": "layer norm"}, "the mean is subtracted: that is LayerNorm, RMSNorm leaves it out"),
    ({"size": "deviation"}, "you divide by the standard deviation (var subtracts the mean): take the mean of squares"),
    ({"size": "sample deviation"}, "you divide by the standard deviation (var subtracts the mean): take the mean of "
                                   "squares"),
    ({"size": "sum"}, "this is the sum of squares: take their mean"),
    ({"size": "abs"}, "this is the mean of absolute values: take the root of the mean of squares"),
    ({"size": "mean²"}, "you take the mean first and square it: square first, then take the mean"),
    ({"size": "largest"}, "you divide by the largest value: divide by the root of the mean square"),
    ({"size": "not at all"}, "x is not divided by anything: the root of the mean square is missing"),
    ({"eps": "none"}, "self.eps is missing: a vector near zero would be blown up or become NaN"),
    ({"eps": "outside"}, "self.eps is added after the root: it belongs inside, to the mean square"),
    ({"eps": "1e-6"}, "1e-6 is written into the code: use self.eps, which differs between models"),
    ({"eps": "1e-5"}, "1e-5 is written into the code: use self.eps, which differs between models"),
    ({"root": False}, "the square root is missing: divide by the root of the mean square"),
    ({"divide": False}, "you multiply by the root of the mean square: divide by it (torch.rsqrt is 1/sqrt)"),
    ({"keep": False}, "keepdim=True is missing: the mean lost its axis and divides the wrong values"),
    ({"axis": -2}, "the mean runs over the tokens: it belongs over the last axis, each vector by itself"),
    ({"axis": 0}, "the mean runs over the first axis: it belongs over the last, each vector by itself"),
    ({"axis": 1}, "the mean runs over axis 1: it belongs over the last, each vector by itself"),
    ({"axis": None}, "one mean is taken over all values together: take it over the last axis, each vector by itself"),
], shape="", explain=explain_rms, errors={"mean(): input dtype": "mean() needs floating point numbers"})


# --- inverse_frequencies ---

def frequency_cases() -> list[Case]:
    small = {"head_dim": 8, "rope_theta": 10000.0}
    return [Case({"_config": config(**(small | more)), "_meta": meta}, tags)
            for more, meta, tags in (
                ({}, False, ()), ({"head_dim": 32, "rope_theta": 1e6, "hidden_size": 96}, False, ()),
                ({"head_dim": 2}, False, ("for a head of two values",)),
                ({"rope_scaling": Yarn(4.0, 256)}, False, ("with YaRN",)), ({}, True, ("on the meta device",)))]


def run_frequencies(module: ModuleType, i: SimpleNamespace) -> tuple[Tensor, float]:
    with torch.device("meta" if i._meta else "cpu"):
        return module.inverse_frequencies(i._config)


def wrong_frequencies(i: SimpleNamespace, exponent="2j/N", theta=None, invert=False, factor=1.0, start=0, flip=False,
                      dtype=torch.float32, size=None, everywhere=True) -> tuple[Tensor, float]:
    c = i._config
    N = {"hidden": c.hidden_size // c.num_attention_heads, "half": c.head_dim // 2}.get(size, c.head_dim)
    j = torch.arange(start, N // 2 + start, dtype=torch.float32)
    if exponent == "all":
        j = torch.arange(0, N, dtype=torch.float32)
    power = {"2j/N": 2 * j / N, "j/N": j / N, "4j/N": 4 * j / N, "all": j / N, "2j": 2 * j,
             "to the end": 2 * j / max(N - 2, 1), "divided to the end": 2 * j / (N - 2), "j": j,
             "2j/D": 2 * j / c.hidden_size}[exponent]
    period = (theta or c.rope_theta) ** (-power if invert else power) * factor
    period = (period.flip(0) if flip else period).to(dtype)
    if i._meta and not everywhere:
        period = period.to("meta")
    if c.rope_scaling:
        return real.yarn(period, c.rope_theta, c.rope_scaling)
    return 1 / period, 1.0


def explain_frequencies(a: object, b: object, case: Case) -> str | None:
    if isinstance(a, tuple) and isinstance(a[0], Tensor):
        if a[0].device.type == "meta":
            return ('on the meta device, where load_model builds the model, the numbers are lost: create the tensor '
                    'with device="cpu"')
        if a[0].shape != b[0].shape:
            return f"there are {len(a[0]) if a[0].ndim else 0} numbers for a head of {2 * len(b[0])} values: one for " \
                   f"each pair, {len(b[0])}, are wanted"
        if a[0].dtype != b[0].dtype:
            return f"the frequencies are {str(a[0].dtype)[6:]}: float32 is wanted (arange makes integers unless told)"
    return None


FREQUENCIES = Check(frequency_cases, run_frequencies, wrong_frequencies, [
    ({"everywhere": False}, 'on the meta device, where load_model builds the model, the numbers are lost: create the '
                            'tensor with device="cpu"'),
    ({"exponent": "j/N"}, "the exponent is j/N: it has to be 2j/N (a head of N values has N/2 pairs)"),
    ({"exponent": "4j/N"}, "the exponent is 4j/N: it has to be 2j/N (arange in steps of 2, divided by N and not N/2)"),
    ({"exponent": "all"}, "there are N frequencies: one for each pair, N/2, with the exponent 2j/N"),
    ({"exponent": "2j"}, "the exponent is not divided by N"),
    ({"exponent": "j"}, "the exponent is j: it has to be 2j/N"),
    ({"exponent": "to the end"}, "the last exponent is 1: the steps are 2/N, so the last is 1 - 2/N"),
    ({"exponent": "divided to the end"}, "the last exponent is 1: the steps are 2/N, so the last is 1 - 2/N"),
    ({"exponent": "2j/D"}, "the exponent is divided by hidden_size: by N, the size of one head"),
    ({"invert": True}, "this is upside down: period is theta^(+2j/N), tokens per radian; the line below inverts it"),
    ({"factor": 2 * torch.pi}, "there is a factor 2 pi too much: period counts tokens per radian, not per turn"),
    ({"factor": 1 / (2 * torch.pi)}, "there is a factor 1/(2 pi) too much: period counts tokens per radian"),
    ({"start": 1}, "j begins with 1: the first pair is j = 0, which turns one radian a token"),
    ({"flip": True}, "the order is reversed: pair 0 is the fastest"),
    ({"theta": 10000.0}, "10,000 is written into the code: use config.rope_theta, which differs between models"),
    ({"theta": 1e6}, "1,000,000 is written into the code: use config.rope_theta, which differs between models"),
    ({"size": "hidden"}, "the head size is computed from hidden_size: use config.head_dim, which is free in Qwen3"),
    ({"size": "half"}, "N/2 stands where N should: take N = config.head_dim"),
    ({"dtype": torch.float64}, "the frequencies are float64: float32 is wanted"),
    ({"dtype": torch.bfloat16}, "the frequencies are bfloat16, which rounds positions away: float32 is wanted"),
], results=("the frequencies", "the factor"), gradient=False, explain=explain_frequencies,
    errors={"on device meta": 'on the meta device the numbers are lost: create the tensor with device="cpu"',
            "same device": 'on the meta device the numbers are lost: create the tensor with device="cpu"',
            "referenced before assignment": "`period` is not defined yet: the lines below it use that name",
            "cannot access local variable 'period'": "`period` is not defined: the lines below use that name",
            "name 'period' is not defined": "`period` is not defined: the lines below use that name"})


# --- rotate ---

def angles(*shape: int, seed: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    turn = normal(*shape, seed=seed, scale=2)
    return turn.cos().to(dtype), turn.sin().to(dtype)


def rotate_cases() -> list[Case]:
    cases = []
    for n, (B, heads, T, N, rows, dtype) in enumerate((
            (2, 3, 5, 8, 1, torch.float32), (2, 2, 4, 6, 2, torch.float32), (1, 1, 1, 2, 1, torch.float32),
            (4, 4, 4, 8, 1, torch.float32), (2, 3, 5, 8, 1, BF16))):
        cos, sin = angles(rows, 1, T, N // 2, seed=n, dtype=dtype)
        tags = ("with other positions in each row",) if rows > 1 else ("in bfloat16",) if dtype == BF16 else ()
        cases.append(Case({"x": normal(B, heads, T, N, seed=n, dtype=dtype), "_cos": cos, "_sin": sin}, tags))
    return cases


def wrong_rotate(i: SimpleNamespace, pairs="half", back="half", sign=1, formula="right", swap=False,
                 order=1) -> Tensor:
    x, cos, sin = i.x, i._cos, sign * i._sin
    if swap:
        cos, sin = sin, cos
    x1, x2 = (x[..., 0::2], x[..., 1::2]) if pairs == "neighbors" else x.chunk(2, -1)
    if formula == "x1 overwritten":
        first = x1 * cos - x2 * sin
        second = x2 * cos + first * sin
    elif formula == "x2 overwritten":
        second = x2 * cos + x1 * sin
        first = x1 * cos - second * sin
    else:
        first = {"no sin": x1 * cos, "minus minus": x1 * cos - x2 * sin, "plus plus": x1 * cos + x2 * sin,
                 "same": x1 * cos - x2 * sin, "once": x1 * cos - x2 * sin,
                 "own": x1 * cos - x1 * sin, "half only": x1 * cos - x2 * sin}.get(formula, x1 * cos - x2 * sin)
        second = {"no sin": x2 * cos, "minus minus": x2 * cos - x1 * sin, "plus plus": x2 * cos + x1 * sin,
                  "same": x1 * cos + x2 * sin, "once": x2,
                  "own": x2 * cos + x2 * sin, "swapped": x1 * cos + x2 * sin}.get(formula, x2 * cos + x1 * sin)
    if formula == "half only":
        return first
    if order == -1:
        first, second = second, first
    if back == "neighbors":
        return torch.stack((first, second), -1).flatten(-2)
    if back == "stacked":
        return torch.stack((first, second), -1)
    return torch.cat((first, second), {"tokens": -2, "heads": 1, "batch": 0}.get(back, -1))


ROTATE = Check(rotate_cases, lambda module, i: module.rotate(i.x, i._cos, i._sin), wrong_rotate, [
    ({"pairs": "neighbors", "back": "neighbors"}, "you turn neighbors (0,1), (2,3), …: Qwen3 pairs value j with value "
                                                  "j + N/2"),
    ({"pairs": "neighbors"}, "you pair neighbors (0,1), (2,3), …: Qwen3 pairs value j with value j + N/2"),
    ({"back": "neighbors"}, "the turned values are put back as neighbors: the first half belongs in front, the second "
                            "after it (torch.cat)"),
    ({"back": "stacked"}, "torch.stack makes a new axis: torch.cat puts both halves side by side"),
    ({"sign": -1}, "it turns backward: x1 cos - x2 sin, and x2 cos + x1 sin"),
    ({"formula": "x1 overwritten"}, "x1 is overwritten before the second half is computed from it: keep the old one"),
    ({"formula": "x2 overwritten"}, "x2 is overwritten before the first half is computed from it: keep the old one"),
    ({"formula": "minus minus"}, "the second half has a minus: it is x2 cos + x1 sin"),
    ({"formula": "plus plus"}, "the first half has a plus: it is x1 cos - x2 sin"),
    ({"formula": "same"}, "the second half has x1 and x2 in the wrong places: it is x2 cos + x1 sin"),
    ({"formula": "no sin"}, "the sines are missing: each half needs both x1 and x2"),
    ({"formula": "own"}, "each half is multiplied by cos and sin of itself: a turn mixes x1 with x2"),
    ({"formula": "once"}, "only the first half is turned: the second is x2 cos + x1 sin"),
    ({"formula": "half only"}, "only the first half is returned: put both side by side with torch.cat"),
    ({"order": -1}, "the halves are exchanged: x1 cos - x2 sin comes first"),
    ({"swap": True}, "cos and sin are exchanged"),
    ({"back": "tokens"}, "torch.cat runs over the tokens: dim=-1 puts the halves side by side"),
    ({"back": "heads"}, "torch.cat runs over the heads: dim=-1 puts the halves side by side"),
    ({"back": "batch"}, "torch.cat runs over the batch: dim=-1 puts the halves side by side"),
], shape="(B, heads, T, N)", errors={
    "at non-singleton dimension 3": "cos and sin have N/2 values, one for each pair: multiply the halves of x by them"})


# --- sdpa ---

def see(first: int, T: int, padding: list[int] | None = None) -> Tensor:
    return real.attention_mask(first, T, torch.tensor(padding)[:, None] if padding else None, torch.device("cpu"))


def sdpa_cases() -> list[Case]:
    cases = []
    for n, (B, H, K, T, S, N, padding, scale, dtype, tags) in enumerate((
            (2, 6, 2, 5, 5, 4, None, 1, torch.float32, ()),
            (1, 4, 4, 4, 4, 4, None, 1, torch.float32, ("where each query head has its own key head",)),
            (2, 4, 1, 3, 7, 8, None, 1, torch.float32, ("with tokens in the cache (S > T)",)),
            (2, 4, 2, 1, 6, 4, None, 1, torch.float32, ("for a single token",)),
            (2, 4, 2, 5, 5, 4, [1, 2], 1, torch.float32, ("with padding",)),
            (1, 2, 2, 6, 6, 16, None, 15, torch.float32, ("for large scores",)),
            (2, 6, 2, 5, 5, 16, None, 1, BF16, ("in bfloat16",)))):
        cases.append(Case({"q": normal(B, H, T, N, seed=n, dtype=dtype, scale=scale),
                           "k": normal(B, K, S, N, seed=n + 20, dtype=dtype, scale=scale),
                           "v": normal(B, K, S, N, seed=n + 40, dtype=dtype), "_mask": see(S - T, T, padding)}, tags))
    return cases


def attention_of(module: ModuleType, N: int, H: int = 2, K: int = 1, seed: int = 0) -> nn.Module:
    c = config(hidden_size=12, num_attention_heads=H, num_key_value_heads=K, head_dim=N)
    return fill(module.Attention(c, layer_idx=1), seed)


real_attention = functools.cache(functools.partial(attention_of, real))


def run_sdpa(module: ModuleType, i: SimpleNamespace) -> Tensor:
    attention = attention_of(module, i.q.shape[-1], i.q.shape[1], i.k.shape[1])
    return attention.sdpa(i.q, i.k, i.v, i._mask)


def wrong_sdpa(i: SimpleNamespace, scale="root", mask="right", axis=-1, groups="blocks", values="v", weigh="softmax",
               flat="right") -> Tensor:
    q, k, v, m = i.q, i.k, i.v, i._mask
    (_, H, T, N), (K, S) = q.shape, k.shape[1:3]
    G = H // K
    if groups == "blocks":
        k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    elif groups == "tiles":
        k, v = k.repeat(1, G, 1, 1), v.repeat(1, G, 1, 1)
    else:
        k, v = k[:, :1].expand(-1, H, -1, -1), v[:, :1].expand(-1, H, -1, -1)
    factor = {"root": N ** -0.5, "none": 1, "1/N": 1 / N, "times": N ** 0.5, "twice": 1 / N, "N": N,
              "D": 12 ** -0.5, "heads": H ** -0.5}.get(scale, N ** -0.5)
    scores = torch.einsum("bhtn,bhsn->bhts", q, k).float()
    scores = scores if scale == "after" else scores * factor
    hidden = ~m
    triangle = torch.ones(T, S, dtype=torch.bool).tril()
    hidden = {"none": torch.zeros_like(hidden), "inverted": m, "own triangle": ~triangle,
              "own": ~see(S - T, T)}.get(mask, hidden)
    hidden = hidden[:1] if mask == "first row" and hidden.ndim == 4 else hidden
    if mask == "zeros":
        scores = scores.masked_fill(hidden, 0)
    elif mask == "misplaced":
        scores = scores.unflatten(1, (K, G)).masked_fill(hidden, -torch.inf).flatten(1, 2)
    elif mask == "added":
        scores = scores + ~hidden
    elif mask == "plus infinity":
        scores = scores.masked_fill(hidden, torch.inf)
    elif mask not in ("after", "after, normalized"):
        scores = scores.masked_fill(hidden, -torch.inf)
    if weigh == "softmax":
        weights = scores.softmax(axis) if axis is not None else scores.flatten(-2).softmax(-1).view_as(scores)
    elif weigh == "exp":
        e = scores.exp()
        weights = e / e.sum(-1, keepdim=True)
    else:
        weights = {"none": scores, "sigmoid": scores.sigmoid(), "log": scores.log_softmax(-1),
                   "unnormalized": scores.exp()}[weigh]
    if mask.startswith("after"):
        weights = weights * ~hidden
        weights = weights / weights.sum(-1, keepdim=True) if "normalized" in mask else weights
    weights = (weights * factor if scale == "after" else weights).to(q.dtype)
    if values == "k":
        v = k
    if values == "transposed":
        weights = weights.mT
    out = torch.einsum("bhts,bhsn->bhtn", weights, v)
    if flat == "scrambled":
        return out.unflatten(1, (K, G)).transpose(1, 2).flatten(1, 2)
    return out.transpose(1, 2) if flat == "tokens first" else out


def sees_the_future(run) -> str | None:
    """`run(changed: bool)` -> (B, ?, T, ?) with T at axis -2, once with other numbers for the last token."""
    before, after = run(False), run(True)
    T = before.shape[-2]
    moved = (before - after).abs().nan_to_num(1).transpose(-2, 0).flatten(1).amax(1) > 1e-6
    if T > 1 and moved[:-1].any():
        return (f"your attention sees the future: token {int(moved[:-1].nonzero()[0])} changed when token {T - 1} did")
    return None


def probe_sdpa(module: ModuleType) -> str | None:
    def run(changed: bool) -> Tensor:
        i = sdpa_cases()[0].copy()
        if changed:
            i.k[:, :, -1] += 1
            i.v[:, :, -1] -= 1
        with torch.no_grad():
            return run_sdpa(module, i)

    before = run(False)
    return sees_the_future(run) if before.shape == (2, 6, 5, 4) else None


SDPA = Check(sdpa_cases, run_sdpa, wrong_sdpa, [
    ({"scale": "none"}, "right shape, but the numbers are those without the scale 1/sqrt(N): multiply the scores by "
                        "self.scale"),
    ({"scale": "1/N"}, "the scores are divided by N: the scale is 1/sqrt(N), self.scale, and is applied once"),
    ({"scale": "times"}, "the scores are multiplied by sqrt(N): the scale divides, self.scale is 1/sqrt(N)"),
    ({"scale": "N"}, "the scores are multiplied by N: the scale is 1/sqrt(N), self.scale"),
    ({"scale": "after"}, "the scale comes after the softmax: multiply the scores by it before"),
    ({"scale": "heads"}, "the scores are divided by the root of the number of heads: the scale is 1/sqrt(N)"),
    ({"scale": "D"}, "the scores are divided by the root of the hidden size: the scale is 1/sqrt(N), of one head"),
    ({"mask": "none"}, "the mask is not used: scores where it is False become -inf before the softmax"),
    ({"mask": "inverted"}, "the mask is inverted: it is True where a query does see the key, so fill where ~mask"),
    ({"mask": "after"}, "the mask comes after the softmax, so the weights no longer add up to 1: fill the scores with "
                        "-inf before it"),
    ({"mask": "after, normalized"}, "large hidden scores drown the others: fill the scores with -inf before the "
                                    "softmax"),
    ({"mask": "zeros"}, "hidden scores become 0, which is a score like others (exp(0) = 1): fill with -inf"),
    ({"mask": "added"}, "True and False are added to the scores as 1 and 0: fill with -inf where the mask is False"),
    ({"mask": "plus infinity"}, "the sign of the infinity is wrong: hidden scores become -inf"),
    ({"mask": "own triangle"}, "you make a triangle of your own, which is wrong with tokens in the cache or with "
                               "padding: use the mask that is given"),
    ({"mask": "own"}, "you make a causal mask of your own, and the padding is seen: use the mask that is given"),
    ({"mask": "first row"}, "the mask of the first row is used for the whole batch"),
    ({"mask": "misplaced"}, "with padding the mask (B, 1, T, S) meets five axes, and its B stands at K: it needs one "
                            "axis more, mask[..., None, :, :]"),
    ({"axis": -2}, "the softmax runs over the queries: it belongs over the keys, the last axis"),
    ({"axis": 1}, "the softmax runs over the heads: it belongs over the keys, the last axis"),
    ({"axis": 0}, "the softmax runs over the batch: it belongs over the keys, the last axis"),
    ({"axis": None}, "one softmax is taken over queries and keys together: over the keys alone, the last axis"),
    ({"weigh": "none"}, "the softmax is missing"),
    ({"weigh": "sigmoid"}, "a sigmoid stands in place of the softmax"),
    ({"weigh": "log"}, "this is log_softmax: the weights are the softmax itself"),
    ({"weigh": "unnormalized"}, "the weights are exp(score), and do not add up to 1: divide by their sum"),
    ({"weigh": "exp"}, "exp overflows for large scores: subtract the largest of each row first, as softmax does"),
    ({"groups": "tiles"}, "the wrong key heads: query head h reads key head h // G, so neighbors share one "
                          "(repeat_interleave, not repeat)"),
    ({"groups": "first"}, "all query heads read key head 0: head h reads key head h // G"),
    ({"values": "k"}, "the weights are multiplied by the keys: the values are v"),
    ({"values": "transposed"}, "the weights are transposed: each query's row weighs the values"),
    ({"flat": "scrambled"}, "the heads come out in another order: flatten K and G as they were split, K first"),
    ({"flat": "tokens first"}, "the result is (B, T, H, N), wanted is (B, H, T, N)"),
], shape="(B, H, T, N)", probe=probe_sdpa, errors={
    "at non-singleton dimension 1": "q has H heads and k has K: query head h reads key head h // G, so G query heads "
                                    "share one"})


# --- attention_mask ---

def mask_cases() -> list[Case]:
    return [Case({"first": first, "T": T, "_padding": None if padding is None else torch.tensor(padding)[:, None],
                  "_device": torch.device(device)}, tags)
            for first, T, padding, device, tags in (
                (0, 5, None, "cpu", ()), (3, 4, None, "cpu", ("with tokens in the cache",)),
                (0, 1, None, "cpu", ("for one token",)), (6, 1, None, "cpu", ("with tokens in the cache",)),
                (0, 5, [0, 2, 1], "cpu", ("with padding",)), (4, 3, [0, 2], "cpu", ("with padding",)),
                (5, 1, [1, 3], "cpu", ("with padding",)), (2, 3, None, "meta", ("on another device",)))]


def wrong_mask(i: SimpleNamespace, rule="<=", first="right", padding="right", own="right", dtype="bool", heads=True,
               flip=False, everywhere=True) -> Tensor:
    start = i.first if first != "ignored" else 0
    q = torch.arange(start, start + i.T)[:, None]
    k = torch.arange(start + i.T if first != "new keys" else i.T)
    if first == "new keys":
        q = torch.arange(i.T)[:, None]
    elif first == "keys only":
        q, k = torch.arange(i.T)[:, None], torch.arange(i.first + i.T)
    mask = {"<=": k <= q, "<": k < q, ">=": k >= q, ">": k > q, "all": (k >= 0) & (q >= 0), "same": k == q}[rule]
    if i._padding is not None and padding != "ignored":
        p = i._padding[:, :, None]
        real_token = {"right": k >= p, "below": k < p, "above": k > p, "at most": k <= p,
                      "at the end": k < len(k) - p, "queries": q >= p, "length": k < p}.get(padding, k >= p)
        mask = mask & real_token
        if own == "right":
            mask = mask | (k == q)
        elif own == "all":
            mask = mask | (q < p)
        mask = mask[:, None] if heads else mask
    elif padding == "ignored" and i._padding is not None:
        mask = mask.expand(len(i._padding), 1, -1, -1) if heads == "same shape" else mask
    if flip:
        mask = mask.mT
    if dtype == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    elif dtype in ("int", "01"):
        mask = mask.to(torch.int64 if dtype == "int" else torch.float32)
    elif dtype == "inverted":
        mask = ~mask
    return mask.to(i._device) if everywhere else mask


def explain_mask(a: object, b: object, case: Case) -> str | None:
    if not isinstance(a, Tensor):
        return None
    if a.device != b.device:
        return "the mask is made on the CPU, whatever `device` says: give torch.arange device=device"
    if a.dtype != torch.bool:
        return f"the mask is {str(a.dtype).removeprefix('torch.')}, wanted is bool: True where a query sees the key"
    if case.inputs["first"] and a.ndim >= 2 and a.shape[-2:] == (case.inputs["T"],) * 2:
        return "`first` is not used: the keys are all first + T tokens, those in the cache too"
    if a.shape != b.shape or torch.equal(a, b) or a.is_meta:
        return None
    *row, t, s = (a != b).nonzero()[0].tolist()
    i = case.inputs
    pads = 0 if i["_padding"] is None else int(i["_padding"][row[0], 0])
    who = f"in row {row[0]} ({pads} slots of padding), " if row else ""
    what = f"the query in slot {i['first'] + t} {'sees' if a[(*row, t, s)] else 'does not see'} the key in slot {s}"
    if a[(*row, t, s)]:
        why = "which comes later" if s > i["first"] + t else "which is padding"
    else:
        why = ("which is itself" if s == i["first"] + t else "which comes before it and is no padding")
    return f"{who}{what}, {why} (first = {i['first']}, T = {i['T']})"


MASK = Check(mask_cases, lambda module, i: module.attention_mask(i.first, i.T, i._padding, i._device), wrong_mask, [
    ({"rule": "<"}, "a query does not see itself: key <= query, not <"),
    ({"rule": ">="}, "the mask is the wrong way round: each query sees the future and not the past (key <= query)"),
    ({"rule": ">"}, "the mask is inverted: it is True where a query sees the key (key <= query), not where it does "
                    "not"),
    ({"dtype": "inverted"}, "the mask is inverted: it is True where a query does see the key"),
    ({"rule": "all"}, "every query sees every key, the future too: key <= query is the rule"),
    ({"rule": "same"}, "a query sees only itself: key <= query is the rule"),
    ({"first": "ignored"}, "`first` is not used: the keys are all first + T tokens, those in the cache too"),
    ({"first": "new keys"}, "`first` is not used: the keys are all first + T tokens, those in the cache too"),
    ({"first": "keys only"}, "the queries are counted from 0: they stand in the slots first, first + 1, … (a triangle "
                             "starts too far to the left when tokens are in the cache)"),
    ({"padding": "ignored"}, "the padding is not used: keys in the first padding[b] slots are no tokens"),
    ({"padding": "ignored", "heads": "same shape"}, "the padding is not used: keys in the first padding[b] slots are "
                                                    "no tokens"),
    ({"padding": "below"}, "the padding is the wrong way round: keys from slot padding[b] on are tokens"),
    ({"padding": "above"}, "the first token after the padding is hidden: key >= padding, not >"),
    ({"padding": "at most"}, "the padding is the wrong way round: keys from slot padding[b] on are tokens"),
    ({"padding": "at the end"}, "the padding is taken for the end of a row: it is at the beginning, slots 0 to "
                                "padding[b] - 1"),
    ({"padding": "queries"}, "the padding hides queries: it is keys that must not be seen"),
    ({"own": "none"}, "a query that is padding sees nothing, and its softmax is NaN: let it see itself"),
    ({"own": "all"}, "a query that is padding sees everything: it sees itself alone"),
    ({"dtype": "float"}, "the mask is 0 and -inf: wanted is bool, True where a query sees the key"),
    ({"dtype": "int"}, "the mask is of integers: wanted is bool"),
    ({"dtype": "01"}, "the mask is float32: wanted is bool"),
    ({"heads": False}, "with padding the shape is (B, T, S): the heads need an axis, (B, 1, T, S)"),
    ({"flip": True}, "queries and keys are exchanged: rows are the T queries, columns the S keys"),
    ({"everywhere": False}, "the mask is made on the CPU, whatever `device` says: give torch.arange device=device"),
], shape="(T, S), or with padding (B, 1, T, S),", gradient=False, explain=explain_mask)


# --- attention ---

D, H, K, N = 12, 6, 2, 4


class Cache:
    """As KVCache, with the tokens that are there given; it counts what is written."""

    def __init__(self, k: Tensor, v: Tensor, padding=None):
        self.k, self.v, self.written, self.padding, self.length = k, v, [], padding, k.shape[2]

    def write(self, layer: int, *new: Tensor) -> list[Tensor]:
        self.written.append((layer, *new))
        return [torch.cat(pair, 2) for pair in zip((self.k, self.v), new)]


def attention_cases() -> list[Case]:
    cases = []
    for n, (B, T, past, padding, tags) in enumerate((
            (2, 5, None, None, ()), (1, 4, None, None, ()), (2, 1, None, None, ("for a single token",)),
            (2, 3, 4, None, ("with a cache",)), (1, 1, 5, None, ("with a cache",)), (2, 6, None, None, ()),
            (2, 5, 0, [0, 2], ("with padding",)))):
        S = (past or 0) + T
        cos, sin = angles(1, 1, T, N // 2, seed=n)
        cases.append(Case({"x": normal(B, T, D, seed=n), "_cos": cos, "_sin": sin,
                           "_mask": see(S - T, T, padding),
                           "_past": None if past is None else (normal(B, K, past, N, seed=n + 30),
                                                               normal(B, K, past, N, seed=n + 60))}, tags))
    return cases


def run_attention(module: ModuleType, i: SimpleNamespace) -> tuple:
    attention = attention_of(module, N, H, K, seed=3)
    cache = None if i._past is None else Cache(*i._past)
    before = cache and cache.length
    out = attention(i.x, i._cos, i._sin, i._mask, cache)
    if cache and cache.length != before:
        raise Off("cache.length is moved on here, once for each layer: the model does it when all have written")
    return (out, [] if cache is None else cache.written)


def wrong_attention(i: SimpleNamespace, qnorm=True, knorm=True, norms="own", order="norm first", turn="qk",
                    vnorm=False, heads="right", out="right", cached="rotated", swap=False, used=True, mask=True,
                    written=True, layer=1, residual=False) -> tuple:
    a = real_attention(N, H, K, seed=3)
    B, T, _ = i.x.shape

    def cut(y: Tensor) -> Tensor:
        if heads == "scrambled":
            return y.view(B, -1, T, N)
        if heads == "sizes exchanged":
            return y.view(B, T, N, -1).transpose(2, 3).transpose(1, 2)
        return y.view(B, T, -1, N).transpose(1, 2)

    if norms == "whole":
        a.q_norm(a.q_proj(i.x))
    q, k, v = cut(a.q_proj(i.x)), cut(a.k_proj(i.x)), cut(a.v_proj(i.x))
    q_norm, k_norm = (a.k_norm, a.q_norm) if norms == "exchanged" else (a.q_norm, a.q_norm if norms == "one"
                                                                       else a.k_norm)
    turned = (lambda y, on: real.rotate(y, i._cos, i._sin) if on in turn else y)
    plain_k = k_norm(k) if knorm else k
    if order.startswith("too early"):
        q = real.rotate(q_norm(q).transpose(1, 2), i._cos, i._sin).transpose(1, 2)
        k = plain_k if order == "too early" else turned(plain_k, "k")
        k = real.rotate(k.transpose(1, 2), i._cos, i._sin).transpose(1, 2) if order == "too early" else k
    elif order == "norm first":
        q, k = turned(q_norm(q) if qnorm else q, "q"), turned(plain_k, "k")
    else:
        q, k = turned(q, "q"), turned(k, "k")
        q, k = q_norm(q) if qnorm else q, k_norm(k) if knorm else k
    v = turned(k_norm(v) if vnorm else v, "v")
    kept = []
    if i._past is not None and written:
        cache = Cache(*i._past)
        given = (plain_k, v) if cached == "before" else (k, v)
        whole = cache.write(layer, *(given[::-1] if swap in (True, "both") else given))
        kept = cache.written
        if used:
            k, v = whole[::-1] if swap == "both" else whole
            if cached in ("before", "again"):
                k = turned(k, "k")
    seen = i._mask if mask else torch.ones_like(i._mask)
    y = a.sdpa(q, *((v, k) if swap == "at the end" else (k, v)), seen)
    if out == "scrambled":
        y = y.reshape(B, T, -1)
    elif out == "sizes exchanged":
        y = y.permute(0, 2, 3, 1).flatten(2)
    else:
        y = y.transpose(1, 2).flatten(2)
    y = a.o_proj(y) if out != "no projection" else y
    return (i.x + y if residual else y, kept)


def probe_attention(module: ModuleType) -> str | None:
    def run(changed: bool) -> Tensor:
        i = attention_cases()[0].copy()
        if changed:
            i.x[:, -1] += 1
        with torch.no_grad():
            return run_attention(module, i)[0]

    before = run(False)
    return sees_the_future(run) if isinstance(before, Tensor) and before.shape == (2, 5, D) else None


def explain_attention(a: object, b: object, case: Case) -> str | None:
    if not isinstance(a, tuple) or not isinstance(a[1], list):
        return None
    if case.inputs["_past"] is not None and len(a[1]) != 1:
        return f"cache.write is called {len(a[1])} times: once, with the new keys and values"
    if a[0] is None or not isinstance(a[0], Tensor):
        return "it returns nothing: the last line has to be `return …`" if a[0] is None else None
    return None


ATTENTION = Check(attention_cases, run_attention, wrong_attention, [
    ({"qnorm": False, "knorm": False}, "QK-Norm is missing: self.q_norm and self.k_norm come before the rotation"),
    ({"qnorm": False}, "self.q_norm is missing: queries are normed before the rotation"),
    ({"knorm": False}, "self.k_norm is missing: keys are normed before the rotation"),
    ({"norms": "exchanged"}, "q_norm and k_norm are exchanged"),
    ({"norms": "one"}, "the keys go through self.q_norm: they have self.k_norm"),
    ({"vnorm": True}, "the values are normed: only queries and keys are"),
    ({"order": "rotation first"}, "the rotation comes before the norm: the norm's weight differs within a pair, so "
                                  "norm "
                                  "first"),
    ({"norms": "whole"}, "self.q_norm gets all heads together: it norms the N values of each, so cut into heads first"),
    *[({"order": order}, "the rotation comes before transpose(1, 2): cos and sin belong to (B, heads, T, N), and T is "
                         "not in its place yet") for order in ("too early", "too early, queries")],
    ({"turn": ""}, "the rotation is missing: rotate queries and keys after their norms"),
    ({"turn": "k"}, "the queries are not rotated"),
    ({"turn": "q"}, "the keys are not rotated"),
    ({"turn": "qkv"}, "the values are rotated: only queries and keys are"),
    ({"heads": "scrambled"}, "the heads are cut wrongly: view(B, T, heads, N) first, then transpose(1, 2); a view as "
                             "(B, heads, T, N) mixes tokens"),
    ({"heads": "sizes exchanged"}, "the heads are cut wrongly: the last axis is heads x N, so view(B, T, -1, N)"),
    ({"out": "scrambled"}, "the heads are joined wrongly: transpose(1, 2) first, then flatten(2); else tokens are "
                           "mixed"),
    ({"out": "sizes exchanged"}, "the heads are joined wrongly: transpose(1, 2), then flatten(2)"),
    ({"out": "no projection"}, "self.o_proj is missing at the end"),
    ({"mask": False}, "the mask is not handed on to self.sdpa"),
    ({"residual": True}, "x is added: the layer does that, attention returns its own part alone"),
    ({"cached": "before"}, "keys go into the cache before the rotation: they are rotated once, by their own position, "
                           "and then kept"),
    ({"cached": "again"}, "keys that come out of the cache are rotated again: they were, when they went in"),
    ({"swap": True}, "cache.write wants keys, then values"),
    ({"swap": "both"}, "keys and values are exchanged in the cache: it wants keys first, then values"),
    ({"swap": "at the end"}, "self.sdpa wants keys, then values"),
    ({"used": False}, "what cache.write returns is not used: it is the keys and values of all tokens so far"),
    ({"written": False}, "the cache is not used: with one, k, v = cache.write(self.layer_idx, k, v)"),
    ({"layer": 0}, "every layer writes to place 0 of the cache: use self.layer_idx"),
], results=("the result", "what is written to the cache"), shape="(B, T, D)", probe=probe_attention,
    explain=explain_attention, errors={
        "is invalid for input of size": "a shape does not fit: H*N need not be D, so view(B, T, -1, N) and flatten(2)",
        "view size is not compatible": "after transpose the numbers lie in another order: flatten(2) or reshape, not "
                                       "view"})


# --- kv_cache ---

def cache_cases() -> list[Case]:
    return [Case({"layer": layer, "_new": [normal(B, heads, T, size, seed=n * 3 + place) for place, (heads, size)
                                           in enumerate(sizes)],
                  "_length": length, "_capacity": capacity, "_sizes": sizes, "_rows": B}, tags)
            for n, (layer, B, T, length, capacity, sizes, tags) in enumerate((
                (1, 2, 3, 2, 7, [(2, 4), (2, 4)], ()), (0, 1, 4, 0, 6, [(2, 4), (2, 4)], ()),
                (2, 1, 1, 4, 6, [(1, 4), (1, 4)], ("for a single token",)),
                (1, 2, 2, 1, 5, [(1, 6)], ("with one tensor, as in latent attention",)),
                (1, 1, 3, 4, 7, [(2, 4), (2, 4)], ("where it becomes full",)),
                (1, 1, 3, 5, 7, [(2, 4), (2, 4)], ("where the tokens do not fit",))))]


def run_cache(module: ModuleType, i: SimpleNamespace) -> tuple:
    layers = [SimpleNamespace(cached=i._sizes)] * 3
    cache = module.KVCache(layers, i._capacity, torch.float32, padding=[0] * i._rows)
    for place, tensor in enumerate(cache.tensors):
        tensor.copy_(normal(*tensor.shape, seed=500 + place))
    cache.length = i._length
    places = [tensor.data_ptr() for tensor in cache.tensors]
    out = cache.write(i.layer, *i._new)
    views = isinstance(out, list | tuple) and all(
        isinstance(part, Tensor) and part.untyped_storage().data_ptr() == place
        for part, place in zip(out, places))
    values = [part.clone() for part in out] if isinstance(out, list | tuple) and all(
        isinstance(part, Tensor) for part in out) else out
    grown = [tensor.shape for tensor in cache.tensors]
    return values, [tensor.clone() for tensor in cache.tensors], cache.length, views, str(grown)


def wrong_cache(i: SimpleNamespace, place="length", back="all", moved=False, layer="own", check=True, copies=False,
                rows="all", swap=False, inplace=True, one=False) -> tuple:
    tensors = []
    for number, (heads, size) in enumerate(i._sizes):
        shape = 3, i._rows, heads, i._capacity, size
        tensors.append(normal(*shape, seed=500 + number))
    T, n = i._new[0].shape[2], i._length
    end = n + T
    if check and end + (check == "early") > i._capacity:
        raise ValueError
    at = i.layer if layer == "own" else 0
    start = {"length": n, "zero": 0, "one late": n + 1, "one early": max(n - 1, 0), "end": i._capacity - T}[place]
    for tensor, part in zip(tensors, i._new[::-1] if swap else i._new):
        if rows == "first":
            tensor[at, :1, :, start:start + T] = part[:1]
        elif inplace:
            tensor[at, :, :, start:start + T] = part
        if one:
            break
    out = {"all": [t[at, :, :, :end] for t in tensors], "new": list(i._new),
           "whole": [t[at] for t in tensors], "everything": tensors, "before": [t[at, :, :, :n] for t in tensors],
           "from length": [t[at, :, :, n:end] for t in tensors], "joined": [
               torch.cat((t[at, :, :, :n], part), 2) for t, part in zip(tensors, i._new)],
           "first": tensors[0][at, :, :, :end], "nothing": None}[back]
    length = n + T if moved is True else n + (1 if moved else 0)
    values = [part.clone() for part in out] if isinstance(out, list) else out
    views = isinstance(out, list) and back not in ("new", "joined") and not copies
    return values, tensors, length, views, str([t.shape for t in tensors])


def explain_cache(a: object, b: object, case: Case) -> str | None:
    if not isinstance(a, tuple):
        return None
    values, tensors, length, views, grown = a
    if values is None:
        return "it returns nothing: return the views of all tokens so far"
    if not isinstance(values, list):
        return f"it returns a {type(values).__name__}: wanted is the list of views, one for each tensor"
    if grown != b[4]:
        return "self.tensors are replaced or grow: they are allocated once, write into their slots"
    if length != b[2]:
        return "self.length is changed: the model moves it on when all layers have written"
    shapes = [tuple(x.shape) for x in values]
    if shapes != [tuple(x.shape) for x in b[0]]:
        return f"the returned shapes are {shapes}, wanted are {[tuple(x.shape) for x in b[0]]}: (B, K, S, N), all " \
               "tokens so far"[:200]
    if not all(map(torch.equal, values, b[0])):
        return "the returned keys and values are not those in the cache, followed by the new ones"
    if not all(map(torch.equal, tensors, b[1])):
        return "the right tokens come back, and self.tensors do not hold them: the next step will miss them"
    if not views:
        return "copies are returned: hand out views of self.tensors, so that no step copies the whole cache"
    return None


KV_CACHE = Check(cache_cases, run_cache, wrong_cache, [
    ({"place": "zero"}, "the new tokens are written from slot 0 on, over the old ones: they start at self.length"),
    ({"place": "one late"}, "the new tokens start one slot too late: slot self.length is the first free one"),
    ({"place": "one early"}, "the new tokens start one slot too early, over the last old one"),
    ({"place": "end"}, "the new tokens are written at the end of the capacity: they start at self.length"),
    ({"back": "new"}, "only the new tokens come back: return all so far, the slots from 0 to length + T"),
    ({"back": "from length"}, "only the new tokens come back: return all so far, the slots from 0 to length + T"),
    ({"back": "before"}, "the new tokens are missing in what comes back: return the slots from 0 to length + T"),
    ({"back": "whole"}, "the whole capacity comes back, with slots that hold nothing yet: cut at length + T"),
    ({"back": "everything"}, "the tensors of all layers come back: return this layer's slots from 0 to length + T"),
    ({"back": "joined"}, "copies are returned: hand out views of self.tensors, so that no step copies the whole cache"),
    ({"back": "joined", "inplace": False}, "old and new are joined by torch.cat, and self.tensors do not hold the new: "
                                           "write into the slots, the next step will want them"),
    ({"back": "first"}, "only the keys come back: return a list, keys and values"),
    ({"back": "nothing"}, "it returns nothing: return the views of all tokens so far"),
    ({"moved": True}, "self.length is moved on here, once for each layer: the model does it when all have written"),
    ({"moved": 1}, "self.length is moved on here: the model does it when all layers have written"),
    ({"layer": "zero"}, "every layer writes to place 0: use `layer`"),
    ({"check": False}, "tokens that do not fit raise no ValueError of yours: compare length + T with self.capacity"),
    ({"check": "early"}, "a cache that becomes exactly full is refused: the last slot is at capacity - 1"),
    ({"rows": "first"}, "only the first row of the batch is written"),
    ({"swap": True}, "keys and values are exchanged"),
    ({"inplace": False}, "the new tokens are not written into self.tensors"),
    ({"one": True}, "only the first tensor is written: keys, and not the values"),
    ({"copies": True}, "copies are returned: hand out views of self.tensors, so that no step copies the whole cache"),
], results=("what comes back", "self.tensors", "self.length"), gradient=False, explain=explain_cache,
    errors={"must match the existing size": "the new tokens do not fit into the slots self.length to self.length "
                                            "+ T; where that is beyond self.capacity, raise ValueError"})


# --- mlp ---

def mlp_cases() -> list[Case]:
    return [Case({"x": normal(*shape, seed=n, dtype=dtype)}, tags) for n, (shape, dtype, tags) in enumerate((
        ((2, 5, 8), torch.float32, ()), ((1, 1, 8), torch.float32, ("for a single token",)),
        ((6, 8), torch.float32, ("for x (n, D)",)), ((2, 3, 8), BF16, ("in bfloat16",))))]


def run_mlp(module: ModuleType, i: SimpleNamespace) -> Tensor:
    return fill(module.MLP(8, 14), 5, i.x.dtype)(i.x)


def wrong_mlp(i: SimpleNamespace, activation="silu", on="gate", parts="both", join="times", down=True,
              residual=False) -> Tensor:
    m = fill(real.MLP(8, 14), 5, i.x.dtype)
    act = {"silu": F.silu, "none": lambda y: y, "relu": F.relu, "gelu": F.gelu, "sigmoid": torch.sigmoid,
           "tanh": torch.tanh, "gelu tanh": lambda y: F.gelu(y, approximate="tanh"), "softmax": lambda y: y.softmax(-1),
           "square": lambda y: F.relu(y).square()}[activation]
    gate, up = m.gate_proj(i.x), m.up_proj(i.x)
    if on == "gate":
        gate = act(gate)
    elif on == "up":
        up = act(up)
    elif on == "both":
        gate, up = act(gate), act(up)
    y = {"both": lambda: gate * up if join == "times" else gate + up, "gate": lambda: gate,
         "up": lambda: up}[parts]()
    y = act(y) if on == "product" else y
    y = m.down_proj(y) if down else y
    return i.x + y if residual else y


MLP = Check(mlp_cases, run_mlp, wrong_mlp, [
    ({"on": "up"}, "silu is on the wrong projection: it belongs to gate_proj, and up_proj stays as it is"),
    ({"on": "both"}, "silu is on both projections: it belongs to gate_proj alone"),
    ({"on": "product"}, "silu comes after the product: it belongs to gate_proj alone, before it"),
    ({"activation": "none"}, "silu is missing: F.silu(self.gate_proj(x))"),
    ({"activation": "relu"}, "this is relu: SwiGLU has silu"),
    ({"activation": "gelu"}, "this is gelu: SwiGLU has silu"),
    ({"activation": "gelu tanh"}, "this is gelu: SwiGLU has silu"),
    ({"activation": "sigmoid"}, "this is the sigmoid: silu(x) is x * sigmoid(x)"),
    ({"activation": "tanh"}, "this is tanh: SwiGLU has silu"),
    ({"activation": "softmax"}, "this is a softmax: SwiGLU has silu"),
    ({"activation": "square"}, "this is the square of relu: SwiGLU has silu"),
    ({"join": "plus"}, "the two projections are added: multiply them"),
    ({"parts": "gate"}, "up_proj is missing: silu(gate) * up"),
    ({"parts": "up", "on": "none"}, "gate_proj is missing: silu(gate) * up"),
    ({"parts": "up", "on": "up"}, "gate_proj is missing: silu(gate) * up"),
    ({"down": False}, "down_proj is missing: the result has F values where D are wanted"),
    ({"residual": True}, "x is added: the layer does that, the MLP returns its own part alone"),
], shape="(B, T, D)")


CHECKS = {"rms_norm": RMS, "inverse_frequencies": FREQUENCIES, "rotate": ROTATE, "sdpa": SDPA, "attention_mask": MASK,
          "attention": ATTENTION, "kv_cache": KV_CACHE, "mlp": MLP}
