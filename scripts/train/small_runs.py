"""The small runs behind the pictures: the same code as every training here, on models that train in seconds.

Each function returns the numbers of one picture, which pictures.py keeps in pictures/numbers.json.
"""

import importlib
import json
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from . import data, own_data  # noqa: I001  before torch: see qwen3/__init__.py

import torch
from torch import nn

from . import checkpoint
from .balance import routers
from .configs import LEARNING_RATE
from .corpus import Corpus, entries
from .show import thin
from .training import WARM_UP, Training, adamw, muon_and_adamw, schedule

SEED = 20
VOCABULARY, ROW, TOKENS = 512, 128, 2048
SMALL = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 48}
SIZES = {"qwen3": SMALL, "qwen3_moe": SMALL, "deepseek_v3": SMALL | {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 16,
    "v_head_dim": 16}}

Rows = Callable[[random.Random], Iterator[data.Part]]


def sgd(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)]


def muon(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW as in every training here, with one rate for both, so that no optimizer is tuned more finely."""
    matrices, others = muon_and_adamw(model, rate)
    others.param_groups[0]["lr"] = rate
    return [matrices, others]


# The names in the picture, how each is made, and the rates that are tried.
OPTIMIZERS = {"SGD with momentum": (sgd, [0.03, 0.1, 0.3]), "AdamW": (adamw, [3e-3, 1e-2, 2e-2, 4e-2]),
              "Muon, and AdamW": (muon, [3e-3, 1e-2, 2e-2, 4e-2])}


class Small:
    """A package's small model, its tokenizer, and its batches: of the whole corpus, or of a few conversations."""

    def __init__(self, package: str, folder: Path, conversations: list[own_data.Conversation] | None = None):
        torch.set_num_threads(1)  # other numbers of threads add up in other orders
        self.package, self.folder = package, folder
        corpus = Corpus("a small model", package)
        texts = islice(data.tokenizer_texts(corpus), 3000) if conversations is None else [
            "user\nassistant\n", *(f"{messages[0]['content']}\n{answer}" for messages, _, answer in conversations)]
        checkpoint.write_new(folder, package, data.train_tokenizer(texts, package, VOCABULARY), chat=True)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | SIZES[package]))
        self.tokenizer = importlib.import_module(f"{package}.tokenizer").Tokenizer.from_checkpoint(folder)
        turns = data.Turns(self.tokenizer)
        self.rows: Rows = partial(data.of_corpus, corpus, turns)
        if conversations is not None:
            parts = own_data.parts_of(conversations, turns)
            self.rows = partial(own_data.of_conversations, parts, self.tokenizer.bos_ids)

    def training(self, make: Callable[[nn.Module, float], list], rate: float, tokens: int = TOKENS) -> Training:
        """Always from the same random weights, and always with the same batches."""
        torch.manual_seed(SEED)
        model = checkpoint.new_model(self.folder, self.package)
        return Training(model, make(model, rate), lambda step: data.batch(self.rows, SEED, step, {ROW: 1}, tokens))

    def answer(self, model: nn.Module, question: str, max_new_tokens: int = 40) -> str:
        """Greedy, by the model as it now is; line breaks are shown."""
        prompt = self.tokenizer.chat([{"role": "user", "content": question}], thinking=False)
        generate = importlib.import_module(f"{self.package}.generate").generate
        ids = generate(model, prompt, max_new_tokens=max_new_tokens, stop_ids=model.config.eos_token_id)
        return " ".join(self.tokenizer.decode(list(ids)).replace("\n", " ↵ ").split())


class Loads:
    """How many choices fell on each expert: layer -> one list of E counts a step."""

    def __init__(self, model: nn.Module):
        self.counts = []
        for layer, router in enumerate(routers(model)):
            self.counts.append([])
            router.register_forward_hook(partial(self.listen, layer))

    def listen(self, layer: int, router: nn.Module, inputs: tuple, outputs: tuple) -> None:
        if torch.is_grad_enabled():
            self.counts[layer].append(torch.bincount(outputs[1].flatten(), minlength=len(router.weight)).tolist())

    def shares(self, layer: int, first: int, end: int) -> list[float]:
        """Of each expert, over these steps."""
        counts = torch.tensor(self.counts[layer][first:end]).sum(0)
        return [round(share, 4) for share in (counts / counts.sum()).tolist()]


def rounded(values: list[float], count: int = 100) -> list[float]:
    return [round(value, 3) for value in thin(values, count)]


def measure_schedule(folder: Path, steps: int = 2600) -> dict:
    shown = sorted({0, WARM_UP, *range(0, steps, 50), steps - 1})
    return {"steps": steps, "warm_up": WARM_UP, "points": [[step, round(schedule(step, steps), 4)] for step in shown]}


def measure_optimizers(folder: Path, steps: int = 250) -> dict:
    """For each optimizer the loss with the best of its rates, and where the other rates ended."""
    small, runs = Small("qwen3", folder), {}
    for name, (make, rates) in OPTIMIZERS.items():
        tried = {}
        for rate in rates:
            training = small.training(make, rate)
            tried[rate] = [training.run_step(steps) for _ in range(steps)]
            print(f"  {name}, rate {rate:g}: {last(tried[rate]):.3f}", flush=True)
        best = min(tried, key=lambda rate: last(tried[rate]))
        runs[name] = {"rate": best, "ends": {f"{rate:g}": round(last(tried[rate]), 3) for rate in rates},
                      "losses": rounded(tried[best], steps // 5)}
    return {"steps": steps, "vocabulary": VOCABULARY, "runs": runs}


def last(losses: list[float], count: int = 20) -> float:
    """The mean of the last steps; a loss that is no number any more counts as the worst."""
    mean = sum(losses[-count:]) / count
    return mean if math.isfinite(mean) else math.inf


def measure_balance(folder: Path, steps: int = 300) -> dict:
    """The share of each expert in the last 50 steps, with the balance loss and without."""
    small, runs = Small("qwen3_moe", folder), {}
    for name in ("without", "with"):
        training = small.training(muon_and_adamw, LEARNING_RATE["qwen3_moe"])
        if name == "without":
            forget_balance_loss(training)
        loads = Loads(training.model)
        losses = [training.run_step(steps) for _ in range(steps)]
        runs[name] = {"loss": round(last(losses, 50), 3),
                      "layers": [loads.shares(layer, steps - 50, steps) for layer in range(len(loads.counts))]}
        print(f"  {name} the balance loss: {runs[name]}", flush=True)
    return {"steps": steps, "runs": runs}


def forget_balance_loss(training: Training) -> None:
    """Its terms are dropped: they would keep every step's graph alive."""
    terms = training.balance_loss.terms
    training.balance_loss.loss = lambda: terms.clear() or 0.0


def measure_bias(folder: Path, steps: int = 250, layer: int = 1, window: int = 10) -> dict:
    """The load of each expert of one layer, in windows of some steps, and its bias at the end of each window."""
    small, runs = Small("deepseek_v3", folder), {}
    for name in ("without", "with"):
        training = small.training(muon_and_adamw, LEARNING_RATE["deepseek_v3"])
        if name == "without":
            training.balance_bias = None
        loads, bias = Loads(training.model), []
        for _ in range(steps):
            training.run_step(steps)
            bias.append([round(b, 4) for b in routers(training.model)[layer].e_score_correction_bias.tolist()])
        runs[name] = {"load": [loads.shares(layer, first, first + window) for first in range(0, steps, window)],
                      "bias": bias[window - 1::window]}
        for each in range(len(loads.counts)):
            print(f"  {name} the bias, router {each}: {loads.shares(each, steps - 50, steps)}", flush=True)
    return {"steps": steps, "window": window, "runs": runs}


def measure_says(folder: Path, steps: int = 400, words: int = 100) -> dict:
    """What one question is answered on the way. So small a model learns a few entries in this time, not the corpus."""
    shown, question = [0, 25, 50, 100, 200, steps], "What is attention?"
    asked = [({"role": "user", "content": f"What is {entry.names[0]}?"}, entry.what) for entry in entries()[:words]]
    conversations = [own_data.Conversation([message], None, answer) for message, answer in asked]
    small = Small("qwen3", folder, conversations)
    training = small.training(muon_and_adamw, LEARNING_RATE["qwen3"], tokens=1024)
    losses, answers = [], []
    for step in range(steps + 1):
        if step in shown:
            answers.append([step, small.answer(training.model, question)])
            print(f"  step {step}: {answers[-1][1]}", flush=True)
        if step < steps:
            losses.append(training.run_step(steps))
    return {"steps": steps, "words": words, "question": question, "answers": answers,
            "losses": rounded(losses, steps // 4)}


MEASURE = {"schedule": measure_schedule, "optimizers": measure_optimizers, "balance": measure_balance,
           "bias": measure_bias, "says": measure_says}
