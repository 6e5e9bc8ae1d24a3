"""The training itself: next-token loss, balanced experts, Muon and AdamW. Then the five files of a checkpoint."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qwen3.tokenizer import IM_END  # noqa: I001  before torch: see qwen3/__init__.py

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from .configs import BALANCE, KINDS, LEARNING_RATE, STEPS
from .data import BOS, ENDOFTEXT, EOS, PAD, SEED, SPECIAL, TEMPLATES, Corpus, batches, examples, train_tokenizer

BIAS_SPEED = 0.001  # step of the correction bias of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2: gamma)
MTP = 0.1  # weight of the loss for the token after the next (the same, section 2.2: lambda)


class Balance:
    """The load-balancing loss, E · Σ_e f_e · P_e averaged over the layers (arXiv:2101.03961, eq. 4-6).

    f_e is the share of the choices that fell on expert e, P_e its mean probability. Both are taken over the whole batch
    and not one sequence, as in Qwen3 (arXiv:2505.09388, section 2; arXiv:2501.11873). Equal use gives 1.
    """

    def __init__(self, model: torch.nn.Module):
        self.losses, self.real = [], None
        for router in routers(model):
            router.register_forward_hook(self.add)

    def add(self, router: torch.nn.Module, inputs: tuple[torch.Tensor], out: tuple[torch.Tensor, torch.Tensor]) -> None:
        scores, chosen = router.logits(inputs[0][self.real]).float().softmax(-1), out[1][self.real]
        share = torch.bincount(chosen.flatten(), minlength=scores.shape[1]) / chosen.numel()
        self.losses.append(scores.shape[1] * (share * scores.mean(0)).sum())

    def of(self, real: torch.Tensor) -> "Balance":
        """Before a forward pass: which of its tokens are not padding (B, T)."""
        self.losses, self.real = [], real.flatten()
        return self

    def loss(self) -> torch.Tensor | float:
        return BALANCE * sum(self.losses) / len(self.losses) if self.losses else 0.0

    def update(self, speed: float) -> None:
        pass


class BalanceByBias(Balance):
    """Balancing without a loss: each step lowers the bias of a busy expert and raises that of an idle one.

    arXiv:2408.15664, algorithm 1.
    """

    def __init__(self, model: torch.nn.Module):
        super().__init__(model)
        self.chosen = {}

    def add(self, router: torch.nn.Module, inputs: tuple[torch.Tensor], out: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.chosen[router] = out[1]

    def update(self, speed: float) -> None:
        for router, chosen in self.chosen.items():
            # The MTP module sees all but the first token of each row.
            real = self.real if len(chosen) == self.real.numel() else self.real[:, 1:]
            counts = torch.bincount(chosen[real.flatten()].flatten(), minlength=len(router.weight)).float()
            router.e_score_correction_bias += speed * (counts.mean() - counts).sign()

    def of(self, real: torch.Tensor) -> "BalanceByBias":
        self.real = real
        return self


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "Router"]


def train(model: torch.nn.Module, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, rate: float,
          padding: int) -> None:
    """Muon for the matrices of the layers (arXiv:2502.16982), AdamW for the rest; short warm-up, linear decay."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and (p.ndim == 1 or "layers" not in name)]
    optimizers = [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0, fused=True)]

    def schedule(step: int) -> float:
        return min((step + 1) / 100, (steps - step) / max(steps - 100, 1))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in optimizers]
    predicts_second = hasattr(model, "mtp")
    balance = (BalanceByBias if predicts_second else Balance)(model)
    started, mean = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        ids, targets = next(stream)
        wanted = targets != -100
        balance.of(ids != padding)
        with torch.autocast("cpu", torch.bfloat16):  # matmuls in bfloat16, weights and sums in float32
            # The head is applied only to positions that have a target.
            hidden = model.model(ids)
            loss = F.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])
            second = 0.0
            if predicts_second:
                ahead = model.model.predict_second(ids[:, 1:], hidden[:, :-1])[wanted[:, 1:]]
                second = MTP * F.cross_entropy(model.lm_head(ahead), targets[:, 1:][wanted[:, 1:]])
        model.zero_grad()
        (loss + second + balance.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for update in (*optimizers, *schedules):
            update.step()
        balance.update(BIAS_SPEED * min(1, 2 * (1 - step / steps)))  # slower towards the end
        mean += (loss.item() - mean) / min(step, 50)
        if step % 50 == 0 or step == steps:
            elapsed = time.monotonic() - started
            print(f"\rstep {step}/{steps}  loss {mean:.4f}  {elapsed / 60:.1f} min, "
                  f"{elapsed * (steps - step) / step / 60:.1f} to go ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def save(model: torch.nn.Module, tokenizer: tokenizers.Tokenizer, package: str, folder: Path) -> None:
    """The five files of a published checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = KINDS[package][1]
    tensors = {name: tensor.detach().to(torch.float32 if name.endswith("_bias") else torch.bfloat16).contiguous()
               for name, tensor in model.named_parameters()}  # a tied head once
    if package == "deepseek_v3":  # as in the release, the MTP module holds copies of the embedding and the head
        last = f"model.layers.{config['num_hidden_layers']}"
        tensors[f"{last}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{last}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = (BOS, EOS, PAD) if package == "deepseek_v3" else (ENDOFTEXT, IM_END, ENDOFTEXT)
    ends = {"bos_token_id": tokenizer.token_to_id(bos), "eos_token_id": tokenizer.token_to_id(eos)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "pad_token": pad,
                "model_max_length": config["max_position_embeddings"], "chat_template": TEMPLATES[package]}
    generation = {"do_sample": False, "eos_token_id": [ends["eos_token_id"], tokenizer.token_to_id(pad)],
                  "pad_token_id": tokenizer.token_to_id(pad)}
    for name, values in (("config", config | ends), ("tokenizer_config", settings), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def make(package: str, folder: Path, steps: int | None) -> None:
    """Train the tiny model of a package, from the seed, and save it in `folder`; steps None: as many as it needs."""
    name, numbers = KINDS[package]
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # more threads split sums differently and give other weights
    corpus = Corpus(name, package)
    library = train_tokenizer(corpus, package)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(numbers), encoding="utf-8")
    Config = importlib.import_module(f"{package}.config").Config
    # The lesson's own code: fused attention adds up in another order and would train other weights.
    model = importlib.import_module(f"{package}.model").Model(Config.from_checkpoint(folder))
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    chat = importlib.import_module(f"{package}.tokenizer")
    padding = library.token_to_id(SPECIAL[package][0])
    train(model, batches(examples(corpus, chat, library), padding), steps or STEPS[package],
          LEARNING_RATE[package], padding)
    save(model, library, package, folder)
