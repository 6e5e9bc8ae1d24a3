"""What happens inside one run: a recorder beside the model, which computes what it always computes.

    with Recorder(package, model, Rows(model.config, len(prompt_ids))) as seen:
        new_ids = list(generate(model, prompt_ids, ...))
    seen.finish(prompt_ids, new_ids, stop_ids)

It looks in two ways, and both only look: no random number is drawn and no tensor written to, so every token and every
logit is that of a run without it. On leaving, after an error and Ctrl-C too, nothing of it is left on the model.

    forward hooks        what goes through the model, its embedding, layers, their parts, routers and head
    listened to          the original runs, and its result is handed on as it is
      attention.sdpa       queries and keys: the fused kernel never shows its weights, so they are computed once more
      sample               the token that was chosen
      choose, verify, draft    the same while drafting, and what became of each draft

The engine's parts and the lesson's have the same seams, so nothing here knows which of them run.
"""

import importlib
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from .limits import SHARES, STRONGEST, Rows
from .listen import Listener
from .switch import count_experts


class Row:
    """What the model computed while it read one token; layers count from 0.

    All of it has its place from the beginning: small tensors kept between large ones that go again would leave the
    memory in pieces.
    """

    def __init__(self, token: int, keys: int, whole: bool, model: torch.nn.Module):
        config, like = model.config, model.model.norm.weight.detach()
        L, H, D = config.num_hidden_layers, config.num_attention_heads, config.hidden_size
        self.token, self.heard = token, set()  # the layers whose attention was heard
        self.stream = like.new_empty(L + 1, D)  # after each layer; the last one, [-1], is the embedding
        self.between = like.new_empty(L, D)  # between attention and MLP
        # How much each head looked at each token, or only where it looked most.
        self.attention = torch.empty(L, H, keys) if whole else None
        self.places = torch.zeros(0 if whole else L, H, min(STRONGEST, keys), dtype=torch.int64)
        self.shares = torch.zeros(0 if whole else L, H, min(STRONGEST, keys))
        E = max(count_experts(config, layer) for layer in range(L))
        A = config.num_experts_per_tok if E else 0
        self.topk_ids, self.weights = torch.zeros(L, A, dtype=torch.int64), torch.zeros(L, A)
        self.scores = torch.zeros(L, E)  # the router's, of all experts
        self.turns: tuple[Tensor, Tensor] | None = None  # cosines and sines of the rotary embedding, (N/2,) each
        self.logits: Tensor | None = None  # (V,), as the head gave them; a prompt's tokens have none but the last

    def keep_strongest(self) -> None:
        self.shares, self.places = self.attention.topk(min(STRONGEST, self.attention.shape[-1]))
        self.attention = None


def largest_difference(one: Tensor, other: Tensor) -> float:
    """As a share of the other's largest value."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-30))


class Recorder(Listener):
    """Listens from `with` on until its end. `rows` is filled with one Row for each position that is kept."""

    def __init__(self, package: str, model: torch.nn.Module, wanted: Rows):
        super().__init__(model)
        self.package, self.model, self.wanted = package, model, wanted
        self.layers = list(model.model.layers[:model.config.num_hidden_layers])  # without a draft layer
        self.rows: dict[int, Row] = {}
        self.drawn: list[int] = []  # tokens as they were chosen; a draft may put some after the last that is used
        self.drafts: list[dict] = []
        self.loads: dict[int, Tensor] = {}  # layer -> how often each expert was chosen, (E,)
        self.last_chosen: dict[int, Tensor] = {}  # layer -> the experts of the last position of a pass
        self.passes = {"prompt": 0, "answer": 0}
        self.error = 0.0  # of attention computed once more, against the kernel's; as a share of the largest value
        self.forms: dict[int, float] = {}  # layer -> the same for the two forms of latent attention
        self.first = self.end = 0  # positions of the last pass
        self.cache = None

    def put_on(self) -> None:
        self.listen_to_model()
        for i, layer in enumerate(self.layers):
            self.listen_to_layer(i, layer)
        self.listen(importlib.import_module(f"{self.package}.generate"), "sample", self.on_sample)
        if len(self.model.model.layers) > len(self.layers):
            speculative = importlib.import_module(f"{self.package}.speculative")
            self.listen(speculative, "choose", self.on_choose)
            self.listen(speculative, "verify", self.on_verify)
            self.draft_layer(speculative, "draft")

    def listen_to_model(self) -> None:
        body = self.model.model
        self.before(body, self.begin_pass)
        self.after(body.embed_tokens, lambda _, x: self.keep("stream", -1, x), "embedding")
        self.after(body.norm, None, "norms")
        self.after(self.model.lm_head, lambda _, logits: self.keep_logits(logits), "head", inside=False)
        self.after(body, lambda *_: self.end_pass())

    def listen_to_layer(self, i: int, layer: torch.nn.Module) -> None:
        """Hooks on the parts of layer i, for what they give and how long they take."""
        attention, mlp = layer.self_attn, layer.mlp
        if i == 0:
            self.before(attention, lambda x, cos, sin, *_: self.keep_turns(cos, sin))
        self.after(layer.input_layernorm, None, "norms")
        self.after(attention, None, "attention")
        self.before(layer.post_attention_layernorm, lambda x: self.keep("between", i, x))
        self.after(layer.post_attention_layernorm, None, "norms")
        self.after(mlp, None, "experts" if hasattr(mlp, "experts") else "MLP")
        self.after(layer, lambda _, x: self.keep("stream", i, x))
        if hasattr(mlp, "experts"):
            self.after(mlp.gate, lambda args, out: self.keep_routing(i, mlp.gate, args[0], *out), "router")
        self.listen(attention, "sdpa", lambda out, *args: self.keep_attention(i, attention.scale, out, *args))
        forms = {"absorbed", "expanded"}
        for name in forms if hasattr(attention, "absorbed") else ():  # latent attention
            (other,) = forms - {name}
            self.listen(attention, name, lambda out, *args, other=getattr(attention, other): self.compare_forms(
                i, other, out, *args))

    # -- what is kept -------------------------------------------------------------------------------------------------

    def begin_pass(self, token_ids: Tensor, cache=None, *_) -> None:
        """A forward pass begins: which of its tokens are wanted, and a row for each."""
        ids = token_ids[0].tolist()
        self.first, before = cache.length if cache is not None else 0, self.end
        self.end, self.inside, self.cache = self.first + len(ids), True, cache
        self.repeated = self.first < before  # a draft was read there, and refused
        self.passes[self.phase] += 1
        was_whole = self.wanted.whole
        self.wanted.begin(self.first, len(ids))
        if was_whole and not self.wanted.whole:
            self.drop_rows()
            for row in self.rows.values():
                row.keep_strongest()
        self.here = [position for position in range(self.first, self.end) if position in self.wanted]
        for position in self.here:  # a refused draft's row is begun anew
            self.rows[position] = Row(ids[position - self.first], position + 1, self.wanted.whole, self.model)
        self.index = torch.tensor(self.here, dtype=torch.int64, device=self.device) - self.first  # their t in the pass

    def end_pass(self) -> None:
        self.inside = False

    def drop_rows(self) -> None:
        self.rows = {position: row for position, row in self.rows.items() if position in self.wanted}

    def keep(self, what: str, layer: int, x: Tensor) -> None:
        """x (1, T, D): the rows that are wanted."""
        if self.inside and self.here:
            for position, one in zip(self.here, x[0, self.index]):
                getattr(self.rows[position], what)[layer] = one

    def keep_turns(self, cos: Tensor, sin: Tensor) -> None:
        if self.inside:
            for position in self.here:
                t = position - self.first
                self.rows[position].turns = cos[0, 0, t].float().clone(), sin[0, 0, t].float().clone()

    def keep_routing(self, layer: int, router: torch.nn.Module, x: Tensor, weights: Tensor, topk_ids: Tensor) -> None:
        """x (T, D), weights and topk_ids (T, A). The scores of all experts are the router's own, before it chooses."""
        chosen = topk_ids.cpu()
        load = torch.bincount(chosen.flatten(), minlength=len(router.weight))
        if self.repeated:
            load -= torch.bincount(self.last_chosen[layer], minlength=len(router.weight))
        self.loads[layer], self.last_chosen[layer] = self.loads.get(layer, 0) + load, chosen[-1].clone()
        if self.here:
            logits = router.logits(x[self.index]).float()
            scores = logits.sigmoid() if hasattr(router, "e_score_correction_bias") else logits.softmax(-1)
            for position, t, one in zip(self.here, self.index.tolist(), scores):
                row = self.rows[position]
                row.topk_ids[layer], row.weights[layer], row.scores[layer] = chosen[t], weights[t], one

    def keep_logits(self, logits: Tensor) -> None:
        """Those of the last positions of a pass: (…, V)."""
        logits = logits.flatten(0, -2)
        for position, one in zip(range(self.end - len(logits), self.end), logits):
            if position in self.rows:
                self.rows[position].logits = one.float().clone()

    def keep_attention(self, layer: int, scale: float, out: Tensor, q: Tensor, k: Tensor, v: Tensor,
                       mask: Tensor) -> None:
        """The softmax of the rows wanted, from the very q, k and mask that sdpa was given; shapes as there.

        With them and v its result is computed once more too, which tells how far the kernel rounds otherwise.
        """
        if not self.here:
            return
        H, S = q.shape[1], k.shape[2]
        for some in self.index.split(max(1, SHARES // (H * S))):
            visible = mask[some] if mask.ndim == 2 else mask[0, 0, some]  # (r, S)
            queries = q[0][:, some].float().unflatten(0, (k.shape[1], -1))  # (K, G, r, N)
            scores = torch.einsum("kgrn,ksn->kgrs", queries, k[0].float()) * scale
            weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
            again = torch.einsum("kgrs,ksm->kgrm", weights, v[0].float()).flatten(0, 1)  # (H, r, M)
            self.error = max(self.error, largest_difference(again, out[0][:, some]))
            for r, t in enumerate(some.tolist()):
                row, looked = self.rows[self.first + t], weights[:, :, r, :self.first + t + 1].flatten(0, 1)
                row.heard.add(layer)
                if self.wanted.whole:
                    row.attention[layer] = looked
                else:
                    row.shares[layer], row.places[layer] = looked.topk(row.places.shape[-1])

    def compare_forms(self, layer: int, other: Callable, out: Tensor, *args) -> None:
        """Latent attention once more in its other form, in one decode step."""
        if self.inside and self.phase == "answer" and layer not in self.forms:
            self.muted = True
            try:
                again = other(*args)
            finally:
                self.muted = False
            self.forms[layer] = largest_difference(again, out)

    # -- what was chosen ----------------------------------------------------------------------------------------------

    def on_draw(self, token: int) -> None:
        self.drawn.append(token)
        self.wanted.drawn(self.wanted.prompt + len(self.drawn) - 1, token)
        if self.phase == "prompt":
            self.end_phase()

    def on_sample(self, tokens: Tensor, *_) -> None:
        self.on_draw(int(tokens[0]))

    def on_choose(self, token: int, *_) -> None:
        self.on_draw(token)

    def on_verify(self, token: int, truth: Tensor, guess: Tensor, drafted: int, *_) -> None:
        """truth and guess (V,): what the model and the draft layer gave every token."""
        self.drafts.append({"at": self.first + 1, "drafted": drafted, "truth": float(truth[drafted]),
                            "guess": float(guess[drafted]), "token": token})
        self.on_draw(token)

    def finish(self, prompt_ids: list[int], new_ids: list[int], stop_ids: Collection[int] = ()) -> list[int]:
        """All tokens with the one that ended the answer, where one did; only rows that read one of them are left."""
        ids = prompt_ids + new_ids
        rest = self.drawn[len(new_ids):]
        if rest and rest[0] in stop_ids:
            ids = ids + rest[:1]
        self.drop_rows()
        self.rows = {position: row for position, row in sorted(self.rows.items())
                     if position < len(ids) - 1 and row.token == ids[position]}
        self.drafts = [draft for draft in self.drafts if draft["at"] < len(ids)]
        for layer, chosen in self.last_chosen.items() if self.end > len(ids) - 1 else ():  # a draft after the end
            self.loads[layer] = self.loads[layer] - torch.bincount(chosen, minlength=len(self.loads[layer]))
        wrong = self.drawn[:len(ids) - len(prompt_ids)] != ids[len(prompt_ids):]
        silent = [layer for layer in range(len(self.layers)) for row in self.rows.values() if layer not in row.heard]
        if wrong or silent:
            what = f"sdpa of layer {silent[0]}" if silent else "the choice of each token"
            raise RuntimeError(f"X-ray heard nothing of {what}: was what it listens to renamed?")
        return ids
