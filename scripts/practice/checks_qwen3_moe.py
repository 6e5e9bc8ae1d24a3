"""Checks of qwen3_moe's exercises."""

import functools
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

from qwen3_moe import moe as real
from qwen3_moe.config import Config
from scripts.train.checks import BALANCE_MISTAKES

from . import solutions
from .exercises import PACKAGES, ROOT
from .judge import Case, Check, fill, normal

BF16 = torch.bfloat16


@functools.cache
def embedded() -> Config:
    return Config.from_checkpoint(ROOT / "checkpoints" / PACKAGES["qwen3_moe"])


def config(**changes) -> Config:
    return replace(embedded(), **({"hidden_size": 10, "num_experts": 6, "num_experts_per_tok": 3,
                                   "moe_intermediate_size": 7} | changes))


# --- router ---

def without_ties(case: Case) -> Case:
    """Only the tokens whose experts all have different scores: which of two equal ones comes first is left open."""
    scores = router_of(real, case.copy()).logits(case.inputs["x"]).sort(-1).values
    case.inputs["x"] = case.inputs["x"][(scores.diff(dim=-1) > 0).all(-1)]
    return case


def router_cases() -> list[Case]:
    return [without_ties(Case({"x": normal(n, 10, seed=seed, dtype=dtype), "_A": A, "_norm": norm, "_dtype": dtype},
                              tags, strict))
            for seed, (n, A, norm, dtype, tags, strict) in enumerate((
                (9, 3, True, torch.float32, ("with norm_topk_prob",), False),
                (9, 3, False, torch.float32, ("without norm_topk_prob",), False),
                (6, 2, False, torch.float32, ("without norm_topk_prob",), False),
                (1, 2, True, torch.float32, ("for a single token", "with norm_topk_prob"), False),
                (7, 1, True, torch.float32, ("with one expert a token", "with norm_topk_prob"), False),
                (400, 3, True, BF16, ("in bfloat16", "with norm_topk_prob"), True)))]


def router_of(module: ModuleType, i: SimpleNamespace) -> nn.Module:
    return fill(module.Router(config(num_experts_per_tok=i._A, norm_topk_prob=i._norm)), 4, i._dtype)


def wrong_router(i: SimpleNamespace, over="softmax", norm="right", axis=-1, choose="largest", count="A", order=1,
                 low=False, weights="chosen", kind="x", late=False, sums=-1) -> tuple:
    router = router_of(real, i)
    scores = i.x.float() @ router.weight.float().T if low == "anew" else router.logits(i.x)
    scores = scores if low is True else scores.float()
    A = {"A": i._A, "2": 2, "one more": i._A + 1, "one less": max(i._A - 1, 1)}[count]
    if over == "chosen":
        values, ids = scores.topk(A)
        values = values.softmax(-1)
    else:
        p = {"softmax": lambda: scores.softmax(axis), "sigmoid": scores.sigmoid, "none": lambda: scores,
             "twice": lambda: scores.softmax(-1).softmax(-1), "log": lambda: scores.log_softmax(-1)}[over]()
        values, ids = p.topk(A, largest=choose == "largest", dim=-1)
        if weights == "logits":
            values = scores.gather(-1, ids)
    if norm == "softmax" and i._norm or norm == "softmax always":
        values = values.softmax(-1)
    elif norm == "largest" and i._norm:
        values = values / values[..., :1]
    elif (norm == "right" and i._norm) or norm == "always" or (norm == "inverted" and not i._norm):
        values = values.to(i.x.dtype) if late else values
        if sums == "no keepdim":
            values = values / values.sum(-1)
        else:
            values = values / (values.sum() if sums == "all" else values.sum(sums, keepdim=True))
    elif norm == "mean" and i._norm:
        values = values / values.mean(-1, keepdim=True)
    if order == -1:
        values, ids = values.flip(-1), ids.flip(-1)
    elif order == "by number":
        ids, places = ids.sort(-1)
        values = values.gather(-1, places)
    values = values if kind == "float32" else values.to(i.x.dtype)
    return (ids, values) if order == "exchanged" else (values, ids)


def explain_router(a: object, b: object, case: Case) -> str | None:
    if isinstance(a, tuple | list) and len(a) == 2 and all(isinstance(x, Tensor) for x in a):
        if a[0].dtype == torch.int64 and a[1].is_floating_point():
            return "the results are exchanged: weights first, then ids"
        if a[0].dtype != b[0].dtype and a[1].shape == b[1].shape:
            return f"the weights are {str(a[0].dtype)[6:]} for x in {str(case.inputs['x'].dtype)[6:]}: they have the " \
                   "type of x"
        if case.strict and a[0].shape == b[0].shape:
            return "the weights are rounded otherwise: self.logits(x) as it is, then .float(); softmax, choice and " \
                   "norm in float32; and the type of x last"
        if a[1].shape == b[1].shape and not torch.equal(a[1], b[1]):
            t = int((a[1] != b[1]).any(-1).nonzero()[0])
            return f"token {t} goes to the experts {a[1][t].tolist()}, right are {b[1][t].tolist()}, the best first"
    return None


ROUTER = Check(router_cases, lambda module, i: tuple(router_of(module, i)(i.x)), wrong_router, [
    ({"over": "chosen"}, "without norm_topk_prob the weights are shares of all E experts, and here they add up to 1: "
                         "softmax over all E, then the choice, and no division by the sum"),
    ({"norm": "never"}, "with norm_topk_prob the chosen weights are divided by their sum"),
    ({"norm": "inverted"}, "norm_topk_prob is the wrong way round"),
    ({"norm": "softmax"}, "with norm_topk_prob the weights are divided by their sum, a second softmax is another "
                          "thing"),
    ({"norm": "softmax always"}, "a second softmax runs over the chosen weights: divide them by their sum, where "
                                 "norm_topk_prob is set"),
    ({"norm": "largest"}, "the weights are divided by the largest: divide by their sum"),
    ({"norm": "mean"}, "the weights are divided by their mean: divide by their sum"),
    ({"sums": 0}, "the weights are divided by the sum over the tokens: by the sum of each token's own (dim=-1)"),
    ({"sums": "all"}, "the weights are divided by the sum over all tokens: by the sum of each token's own (dim=-1)"),
    ({"sums": "no keepdim"}, "keepdim=True is missing in the sum of the weights"),
    ({"over": "sigmoid"}, "a sigmoid stands in place of the softmax: that is DeepSeek-V3's router"),
    ({"over": "none"}, "the softmax is missing: the weights are logits"),
    ({"over": "none", "norm": "never"}, "the softmax is missing: the weights are logits"),
    ({"over": "none", "norm": "always"}, "the softmax is missing: the weights are logits"),
    ({"over": "twice"}, "the softmax is taken twice"),
    ({"over": "log"}, "this is log_softmax: the weights are probabilities"),
    ({"axis": 0}, "the softmax runs over the tokens: it belongs over the experts, the last axis"),
    ({"choose": "smallest"}, "the least likely experts are chosen: topk takes the largest"),
    ({"count": "2"}, "2 experts are chosen always: self.num_experts_per_tok of them"),
    ({"count": "one more"}, "one expert too many is chosen"),
    ({"count": "one less"}, "one expert too few is chosen"),
    ({"order": -1}, "the order is reversed: the best first"),
    ({"order": "by number"}, "the chosen are sorted by their number: the best first, as topk gives them"),
    ({"order": "exchanged"}, "the results are exchanged: weights first, then ids"),
    ({"kind": "float32"}, "the weights stay float32: they have the type of x"),
    ({"low": True}, "the softmax is computed in bfloat16: .float() on the logits first"),
    ({"low": "anew"}, "the logits are computed anew in float32: take self.logits(x), which rounds them to the type of "
                      "x, and .float() on that"),
    ({"late": True}, "the weights are rounded before they are divided by their sum: divide in float32"),
], results=("the weights", "the ids"), shape="(n, A)", explain=explain_router)


# --- mixture, dispatch ---

def routed(n: int, E: int, A: int, seed: int, D: int = 10, dtype: torch.dtype = torch.float32) -> dict:
    """Tokens, and experts for them. One expert is nobody's: the last, or the first where the number is odd."""
    nobody = [50.0] + [0.0] * (E - 1)
    scores = normal(n, E, seed=seed) - torch.tensor(nobody if seed % 2 else nobody[::-1])
    weights, ids = scores.softmax(-1).topk(A)
    return {"x": normal(n, D, seed=seed + 90, dtype=dtype), "weights": (1.5 * weights).to(dtype), "_topk_ids": ids,
            "_E": E}


def mixture_cases() -> list[Case]:
    return [Case(routed(n, E, A, seed), tags) for seed, (n, E, A, tags) in enumerate((
        (7, 5, 3, ()), (4, 6, 2, ()), (1, 4, 2, ("for a single token",)), (5, 3, 1, ("with one expert a token",))))]


def dispatch_cases() -> list[Case]:
    return [*mixture_cases(), Case(routed(6, 5, 2, 9, dtype=BF16), ("in bfloat16",))]


class Counted(nn.Module):
    """An expert that remembers how many tokens it was given each time."""

    def __init__(self, expert: nn.Module):
        super().__init__()
        self.expert, self.calls = expert, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x) if x.ndim > 1 else 1)
        return self.expert(x)


def experts_of(module: ModuleType, i: SimpleNamespace) -> nn.ModuleList:
    experts = fill(module.Experts(i._E, 10, 7), 6, i.x.dtype)
    for number, expert in enumerate(experts):
        experts[number] = Counted(expert)
    return experts


def run_mixture(module: ModuleType, i: SimpleNamespace) -> Tensor:
    return module.mixture(i.x, i.weights, i._topk_ids, list(fill(real.Experts(i._E, 10, 7), 6)))


def run_dispatch(module: ModuleType, i: SimpleNamespace) -> Tensor:
    return experts_of(module, i)(i.x, i.weights, i._topk_ids)


def wrong_mixture(i: SimpleNamespace, weigh="place", add=True, first=False, all=False, mean=False, ids="right",
                  on="output", residual=False, tokens="right", kind="x", last=False) -> Tensor:
    experts, (n, A) = list(fill(real.Experts(i._E, 10, 7), 6, i.x.dtype)), i.weights.shape
    y = i.x.float() * 0
    w, chosen = i.weights, i._topk_ids
    if weigh == "normalized":
        w = w / w.sum(-1, keepdim=True)
    elif weigh == "softmax":
        w = w.softmax(-1)
    if all:
        for t in range(n):
            for e in range(i._E):
                y[t] += (w[t, 0] if all == "weighed" else 1) * experts[e](i.x[t:t + 1])[0].float()
        return y.to(i.x.dtype)
    for t in range(n):
        for a in chosen[t].argsort().tolist() if add == "by number" else range(min(int(first) or A, A)):
            a = A - 1 - a if last else a
            number = {"right": int(chosen[t, a]), "place": a, "next": (int(chosen[t, a]) + 1) % i._E,
                      "first token": int(chosen[0, a]), "reversed": int(chosen[t, A - 1 - a])}[ids]
            factor = {"place": w[t, a], "none": torch.tensor(1.0), "expert": w[t, number % A], "first": w[t, 0],
                      "first token": w[0, a], "squared": w[t, a] ** 2, "reversed": w[t, A - 1 - a]}.get(weigh, w[t, a])
            token = i.x[t:t + 1] if tokens == "right" else i.x[a % n:a % n + 1]
            out = experts[number](factor.to(i.x.dtype) * token if on == "input" else token)[0].float()
            part = out if on == "input" else factor.float() * out
            y[t] = y[t] + part if add is True else part
    y = y / A if mean else y
    y = y + i.x if residual else y
    return y if kind == "float32" else y.to(i.x.dtype)


MIXTURES = [
    ({"weigh": "none"}, "the weights are not used: multiply each expert's output by weights[t, a]"),
    ({"weigh": "none", "mean": True}, "this is the mean of the experts' outputs: multiply each by weights[t, a] and "
                                      "add up"),
    ({"mean": True}, "the sum is divided by A: the weights say already how much each counts"),
    ({"weigh": "expert"}, "the weights are looked up by the number of the expert: weights[t, a] belongs to the place a "
                          "of the choice"),
    ({"weigh": "first"}, "every expert gets the weight of the first choice: weights[t, a] for place a"),
    ({"weigh": "first token"}, "every token gets the weights of token 0"),
    ({"weigh": "reversed"}, "the weights are assigned in reverse: weights[t, a] belongs to topk_ids[t, a]"),
    ({"weigh": "squared"}, "the weights are multiplied in twice"),
    ({"weigh": "normalized"}, "the weights are divided by their sum: the router has done what is to be done"),
    ({"weigh": "softmax"}, "a softmax is taken over the weights: the router has taken it"),
    ({"add": False}, "each expert overwrites the one before, so that the last choice alone counts: add up "
                     "the A results of a token"),
    ({"add": "by number"}, "each expert overwrites the one before, so that one choice alone counts: add up the A "
                           "results of a token"),
    ({"first": True}, "only the first choice of each token counts: all A do"),
    ({"first": 2}, "only the first two choices of each token count: all A do"),
    ({"all": "weighed"}, "every token runs through all experts: only through those of topk_ids"),
    ({"all": True}, "every token runs through all experts: only through those of topk_ids"),
    ({"ids": "place"}, "the place of the choice is taken for the expert: the expert is topk_ids[t, a]"),
    ({"ids": "first token"}, "every token goes to the experts of token 0: topk_ids[t, a]"),
    ({"ids": "next"}, "the wrong expert, by one: they count from 0"),
    ({"on": "input"}, "the weight multiplies the input of the expert: it multiplies the output"),
    ({"residual": True}, "x is added: the layer does that"),
    ({"tokens": "place"}, "the experts get the wrong token: place a is taken for the number of the token"),
]


def explain_mixture(a: object, b: object, case: Case) -> str | None:
    if isinstance(a, Tensor) and a.shape == b.shape and a.dtype != b.dtype:
        return f"the result is {str(a.dtype)[6:]}, and x is {str(b.dtype)[6:]}: it has the type of x"
    return None


def after_dispatch(module: ModuleType) -> str | None:
    i = dispatch_cases()[0].copy()
    experts = experts_of(module, i)
    with torch.no_grad():
        experts(i.x, i.weights, i._topk_ids)
    for number, expert in enumerate(experts):
        wanted = int((i._topk_ids == number).sum())
        if len(expert.calls) > 1 and sum(expert.calls) == wanted:
            return f"the numbers are right, and expert {number} runs {len(expert.calls)} times for {wanted} tokens: " \
                   "once, for all of them together, so that its matrices are read once"
        if sum(expert.calls) > wanted:
            return f"the numbers are right, and expert {number} works for {sum(expert.calls)} tokens, of which " \
                   f"{wanted} chose it: give it those alone"
        if expert.calls and not wanted:
            return f"the numbers are right, and expert {number} runs, which no token chose: leave it out"
    return None


MIXTURE = Check(mixture_cases, run_mixture, wrong_mixture, MIXTURES, shape="(n, D)", explain=explain_mixture,
                errors={"out of bounds for dimension 1": "weights and topk_ids have A columns: the second index is the "
                                                         "place of the choice, not the expert's number",
                        "only integer tensors": "an expert's number is int(topk_ids[t, a])",
                        "only one element tensors": "an expert's number is one entry: int(topk_ids[t, a])"})
DISPATCH = Check(dispatch_cases, run_dispatch, wrong_mixture, [
    *MIXTURES, ({"kind": "float32"}, "the result is float32: it has the type of x")],
    shape="(n, D)", explain=explain_mixture, after=after_dispatch,
    errors={"out of bounds for dimension 1": "weights and topk_ids have A columns: the second index is the place of "
                                             "the "
                                             "choice, not the expert's number",
            "at non-singleton dimension 1": "the weights (m,) need an axis for the D values: weights[token, place, "
                                            "None]",
            "dtypes match": "results and x have different types: keep the type of x"})


# --- moe_block ---

def block_cases() -> list[Case]:
    return [Case({"x": normal(B, T, 10, seed=n), "_shared": shared}, tags) for n, (B, T, shared, tags) in enumerate((
        (2, 3, 0, ("without a shared expert",)), (2, 3, 9, ("with a shared expert",)),
        (3, 1, 9, ("with a shared expert",)), (1, 1, 0, ("for a single token", "without a shared expert")),
        (1, 4, 9, ("with a shared expert",))))]


def block_of(module: ModuleType, i: SimpleNamespace) -> nn.Module:
    return fill(module.SparseMoeBlock(config(shared_expert_intermediate_size=i._shared)), 8)


def wrong_block(i: SimpleNamespace, shared="gated", flat="right", shape=True, residual=False, routed=True,
                weights="right") -> Tensor:
    block = block_of(real, i)
    if flat == "tokens first":
        tokens = i.x.transpose(0, 1).flatten(0, 1)
    elif flat == "squeezed":
        tokens = i.x[0]
    else:
        tokens = i.x.flatten(0, 1)
    w, chosen = block.gate(tokens)
    if weights == "even":
        w = torch.full_like(w, 1 / w.shape[-1])
    y = block.experts(tokens, w, chosen)
    y = y if routed or block.shared_expert is None else y * 0
    if block.shared_expert is not None:
        gate, out = block.shared_expert_gate(tokens), block.shared_expert(tokens)
        y = {"gated": lambda: y + gate.sigmoid() * out, "missing": lambda: y, "no gate": lambda: y + out,
             "no sigmoid": lambda: y + gate * out, "softmax": lambda: y + gate.softmax(-1) * out,
             "silu": lambda: y + nn.functional.silu(gate) * out, "alone": lambda: gate.sigmoid() * out,
             "mixed": lambda: (1 - gate.sigmoid()) * y + gate.sigmoid() * out,
             "gates all": lambda: gate.sigmoid() * (y + out), "tanh": lambda: y + gate.tanh() * out,
             "gate from y": lambda: y + block.shared_expert_gate(y).sigmoid() * out,
             "from y": lambda: y + gate.sigmoid() * block.shared_expert(y),
             "gates routed": lambda: gate.sigmoid() * y + out}[shared]()
    y = y.view_as(i.x) if shape else y
    return y + (i.x if shape else tokens) if residual else y


BLOCK = Check(block_cases, lambda module, i: block_of(module, i)(i.x), wrong_block, [
    ({"shared": "missing"}, "the shared expert is left out: where there is one, it works for every token"),
    ({"shared": "no gate"}, "the shared expert's output is added without its gate: times "
                            "self.shared_expert_gate(tokens).sigmoid()"),
    ({"shared": "no sigmoid"}, "the sigmoid on the shared expert's gate is missing"),
    ({"shared": "silu"}, "the shared expert's gate has a sigmoid, not silu"),
    ({"shared": "tanh"}, "the shared expert's gate has a sigmoid, not tanh"),
    ({"shared": "mixed"}, "the gate mixes routed and shared experts: it scales the shared one alone, and the routed "
                          "ones are added whole"),
    ({"shared": "gates all"}, "the gate scales routed experts too: it belongs to the shared expert alone"),
    ({"shared": "gates routed"}, "the gate is on the routed experts: it belongs to the shared one"),
    ({"shared": "alone"}, "the routed experts are lost where there is a shared one: add both"),
    ({"shared": "from y"}, "the shared expert reads what the routed ones return: it reads the tokens"),
    ({"shared": "gate from y"}, "the shared expert's gate reads what the routed ones return: it reads the tokens"),
    ({"flat": "tokens first"}, "batch and time are exchanged: x.flatten(0, 1), and .view_as(x) at the end"),
    ({"shape": False}, "the result is (n, D): give it the shape of x, (B, T, D)"),
    ({"weights": "even"}, "the router's weights are not used: self.experts(tokens, weights, topk_ids)"),
    ({"residual": True}, "x is added: the layer does that"),
], shape="(B, T, D)", errors={
    "cannot be interpreted as an integer": "self.experts wants (tokens, weights, topk_ids): the last two are exchanged",
    "too many values to unpack": "router and experts know tokens (n, D): x.flatten(0, 1) first",
    "must be a tensor": "self.experts wants (tokens, weights, topk_ids)",
    "has no attribute 'unique'": "self.experts wants tokens, weights and topk_ids: *self.gate(tokens) are the last two",
    "missing 1 required positional argument: 'topk_ids'": "self.experts wants tokens, weights and topk_ids: "
                                                          "*self.gate(tokens) are the last two",
    "has no attribute 'shared_expert_gate'": "self.shared_expert is None where the config has none, and then there is "
                                             "no gate either",
    "'NoneType' object is not callable": "self.shared_expert is None where the config has none"})


# --- balance_loss ---

def balance_cases() -> list[Case]:
    cases, generator = [], torch.Generator().manual_seed(20)
    for n, E, A in ((12, 4, 2), (40, 8, 2), (30, 6, 3), (9, 5, 1)):
        scores = torch.randn(n, E, generator=generator) - torch.tensor([0.0] * (E - 1) + [20.0])
        probabilities = scores.softmax(-1)
        cases.append(Case({"probabilities": probabilities, "topk_ids": probabilities.topk(A).indices}))
    return cases


def chosen_alone(p: Tensor, ids: Tensor) -> Tensor:
    """The probabilities of the chosen experts, which add up to 1, and 0 for the others."""
    chosen = p.gather(-1, ids)
    return torch.zeros_like(p).scatter(-1, ids, chosen / chosen.sum(-1, keepdim=True))


BALANCES = BALANCE_MISTAKES | {
    "the sign is the wrong way round: the loss is large where the load is uneven":
        lambda p, ids: -solutions.balance_loss(p, ids),
    "this is 0 where all experts are used equally: 1 is not subtracted":
        lambda p, ids: solutions.balance_loss(p, ids) - 1,
    "p is normalized again over the chosen experts: P_e is the mean of the probabilities as they are":
        lambda p, ids: solutions.balance_loss(chosen_alone(p, ids), ids),
    "f_e and P_e are summed before they are multiplied: multiply them for each expert, then sum":
        lambda p, ids: p.shape[1] * torch.ones(()),
    "this is the variance of the counts: the loss is E times the sum of f_e · P_e":
        lambda p, ids: torch.bincount(ids.flatten(), minlength=p.shape[1]).float().var(),
}
BALANCE = Check(balance_cases, lambda module, i: module.balance_loss(i.probabilities, i.topk_ids),
                lambda i, number=None: solutions.balance_loss(i.probabilities, i.topk_ids) if number is None
                else list(BALANCES.values())[number](i.probabilities, i.topk_ids),
                [({"number": number}, sentence) for number, sentence in enumerate(BALANCES)],
                errors={**{f"tensor {one} (12)": "P_e is one number for each expert: the mean over the tokens, axis 0"
                           for one in "ab"},  # of the first input, with 12 tokens and 4 experts
                        "must match the size": "an expert that nobody chose is forgotten: torch.bincount needs "
                                               "minlength=E",
                        "bincount only supports 1-d": "all choices are counted in one row: topk_ids.flatten()"})

CHECKS = {"router": ROUTER, "mixture": MIXTURE, "dispatch": DISPATCH, "moe_block": BLOCK, "balance_loss": BALANCE}
