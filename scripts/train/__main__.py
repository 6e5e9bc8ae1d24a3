"""Trains the embedded checkpoints: uv run python -m scripts.train qwen3 | qwen3_moe | deepseek_v3

Real models, a thousandth of the size: they learn the glossary and small talk of corpus.py and sums of
numbers up to three digits, answered at once or digit by digit in a think block. Everything is made here, from
one seed: the conversations, the byte-level BPE, the weights. One sum in ten is never trained on, nor are some
ways to ask; on those they are measured at the end.
"""

import argparse
import importlib
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qwen3.tokenizer import END_THINK, IM_END  # noqa: I001  before torch: see qwen3/__init__.py

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from .corpus import DONT_KNOW, HELD_OUT_PHRASINGS, TRAIN_PHRASINGS, ask, glossary, unknown_things
from .data import (BOS, CONTROL, ENDOFTEXT, EOS, PAD, SEED, SUM_PHRASINGS, TEMPLATES, VOCABULARY, Corpus,
                   batches, examples, is_held_out, train_tokenizer)

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"qwen3": 2600, "qwen3_moe": 2000, "deepseek_v3": 1900}
# Of the matrices. DeepSeek-V3, which has no norm on queries and keys, learned more slowly with steps as large as Qwen3's.
LEARNING_RATE = {"qwen3": 1e-2, "qwen3_moe": 1e-2, "deepseek_v3": 4e-3}
BALANCE = 0.01  # weight of the load-balancing loss of Qwen3-MoE
BIAS_SPEED = 0.001  # step of the correction bias of DeepSeek-V3 (arXiv:2412.19437, section 2.1.2: gamma)
MTP = 0.1  # weight of the loss for the token after the next (the same, section 2.2: lambda)

# H * N = 192 is not D = 128, and K < H: whatever takes one for the other breaks on this checkpoint too.
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    "attention_dropout": 0.0, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 5,
    "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
}
# 8 experts, 2 of them active: each token uses 0.9 of 1.8 million parameters.
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "tie_word_embeddings": False,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False, "router_aux_loss_coef": BALANCE,
}
# No two sizes are alike that could be taken for each other; 3 of 8 experts and one shared, chosen from 2 of 4 groups.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": VOCABULARY, "hidden_size": 128,
    "intermediate_size": 272, "moe_intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 6, "q_lora_rank": 64, "kv_lora_rank": 56, "qk_nope_head_dim": 16, "qk_rope_head_dim": 32,
    "v_head_dim": 30, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0},
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
}
# package -> the checkpoint's name, its config
KINDS = {"qwen3": ("Qwen3-Tiny", QWEN3), "qwen3_moe": ("Qwen3-MoE-Tiny", QWEN3_MOE),
         "deepseek_v3": ("DeepSeek-V3-Tiny", DEEPSEEK_V3)}


class Balance:
    """The load-balancing loss, E · Σ_e f_e · P_e averaged over the layers (arXiv:2101.03961, eq. 4-6).

    f_e is the share of the choices that fell on expert e, P_e its mean probability; both over the whole batch and
    not one sequence, as Qwen3 has it (arXiv:2505.09388, section 2; arXiv:2501.11873). 1 where all are used alike.
    """

    def __init__(self, model: torch.nn.Module):
        self.losses, self.real = [], None
        for router in routers(model):
            router.register_forward_hook(self.add)

    def add(self, router: torch.nn.Module, inputs: tuple[torch.Tensor], out: tuple[torch.Tensor, torch.Tensor]) -> None:
        scores, chosen = router.scores(inputs[0][self.real]), out[1][self.real]
        share = torch.bincount(chosen.flatten(), minlength=scores.shape[1]) / chosen.numel()
        self.losses.append(scores.shape[1] * (share * scores.mean(0)).sum())

    def of(self, real: torch.Tensor) -> "Balance":
        """For a forward of tokens of which these are no padding (B, T)."""
        self.losses, self.real = [], real.flatten()
        return self

    def loss(self) -> torch.Tensor | float:
        return BALANCE * sum(self.losses) / len(self.losses) if self.losses else 0.0

    def update(self, speed: float) -> None:
        pass


class BalanceByBias(Balance):
    """No loss: after each step the bias of a busy expert goes down and that of an idle one up (arXiv:2408.15664, alg. 1)."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(model)
        self.chosen = {}

    def add(self, router: torch.nn.Module, inputs: tuple[torch.Tensor], out: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.chosen[router] = out[1]

    def update(self, speed: float) -> None:
        for router, chosen in self.chosen.items():
            # The layer that looks ahead sees all but the first token of each row.
            real = self.real if len(chosen) == self.real.numel() else self.real[:, 1:]
            counts = torch.bincount(chosen[real.flatten()].flatten(), minlength=len(router.weight)).float()
            router.e_score_correction_bias += speed * (counts.mean() - counts).sign()

    def of(self, real: torch.Tensor) -> "BalanceByBias":
        self.real = real
        return self


def routers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "Router"]


def train(model: torch.nn.Module, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, rate: float, padding: int) -> None:
    """Muon for the matrices inside (Moonlight, arXiv:2502.16982), AdamW for the rest; a short warm-up, then down to zero."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and (p.ndim == 1 or "layers" not in name)]
    optimizers = [
        torch.optim.Muon(inside, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0, fused=True)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, (steps - step) / max(steps - 100, 1))) for optimizer in optimizers]
    predicts_second = hasattr(model, "mtp")
    balance = (BalanceByBias if predicts_second else Balance)(model)
    started, mean = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        ids, targets = next(stream)
        wanted = targets != -100
        balance.of(ids != padding)
        with torch.autocast("cpu", torch.bfloat16):  # products in bfloat16, weights and sums in float32
            # The head is applied only where there is something to learn.
            hidden = model.model(ids)
            x = hidden[wanted]
            logits = model.lm_head(x) if model.lm_head is not None else F.linear(x, model.model.embed_tokens.weight)
            loss = F.cross_entropy(logits, targets[wanted])
            second = 0.0
            if predicts_second:
                ahead = model.model.predict_second(ids[:, 1:], hidden[:, :-1])[wanted[:, 1:]]
                second = MTP * F.cross_entropy(model.head(ahead), targets[:, 1:][wanted[:, 1:]])
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
               for name, tensor in model.state_dict().items()}
    if package == "deepseek_v3":  # as in the release, the MTP module holds the embedding and the head once more
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


def evaluate(package: str, folder: Path) -> dict[str, float]:
    """Shares of exactly right answers of the saved checkpoint, on sums and phrasings that it never saw."""
    model = importlib.import_module(f"{package}.weights").load_model(folder)
    generation = importlib.import_module(f"{package}.generate")
    generate_batch = generation.generate_batch
    tokenizer = importlib.import_module(f"{package}.tokenizer").Tokenizer.from_checkpoint(folder)
    stop_ids = model.config.eos_token_id

    def share(questions: list[tuple[str, str]], thinking: bool) -> float:
        right = 0
        for first in range(0, len(questions), 256):
            part = questions[first:first + 256]
            prompts = [tokenizer.chat([{"role": "user", "content": question}], thinking) for question, _ in part]
            answers = generate_batch(model, prompts, max_new_tokens=120, stop_ids=stop_ids)
            texts = [tokenizer.decode(ids).rpartition(END_THINK)[2].lstrip("\n") for ids in answers]
            right += sum(text == answer for text, (_, answer) in zip(texts, part))
        return right / len(questions)

    rng = random.Random(SEED + 1)
    short = [(a, b) for a in range(100) for b in range(100) if is_held_out(a, b)]
    long = [(a, b) for a in range(1000) for b in range(1000) if is_held_out(a, b) and max(a, b) > 99]
    sums = {digits: [(SUM_PHRASINGS[0].format(a=a, b=b), str(a + b)) for a, b in rng.sample(pairs, 1000)]
            for digits, pairs in ((2, short), (3, long))}

    def words(phrasings: list[str]) -> list[tuple[str, str]]:
        return [(ask(phrasing, names[0]), answer) for phrasing in phrasings for names, answer in glossary()]

    def least_used_expert() -> dict[str, float]:
        """Prompt by prompt, since padding would count as tokens."""
        if package == "qwen3":
            return {}
        routing = importlib.import_module(f"{package}.routing").Routing(model)
        with torch.inference_mode():
            for question, answer in mixed:
                prompt = tokenizer.chat([{"role": "user", "content": question}], thinking=False)
                ids = torch.tensor([prompt + tokenizer.encode(answer)])
                hidden = model.model(ids)
                if package == "deepseek_v3":
                    model.mtp(ids[:, 1:], hidden[:, :-1])
        return {"least used expert, of its fair share": min(
            float(counts.min()) * len(counts) / float(counts.sum()) for counts in routing.counts.values())}

    def accepted_drafts() -> dict[str, float]:
        if package != "deepseek_v3":
            return {}
        shares = {}
        for thinking in (True, False):
            acceptance = generation.Acceptance()
            for question, _ in mixed[::4]:
                prompt = tokenizer.chat([{"role": "user", "content": question}], thinking)
                list(generation.generate(model, prompt, max_new_tokens=120, stop_ids=stop_ids, speculative=True, acceptance=acceptance))
            shares[f"drafts accepted, {'thinking' if thinking else 'direct'}"] = acceptance.accepted / acceptance.drafted
        return shares

    mixed = sums[3][:100] + sums[2][:100] + words(HELD_OUT_PHRASINGS[:2])
    held_out_things = [(ask(phrasing, thing), DONT_KNOW) for phrasing in TRAIN_PHRASINGS[:3] for thing in unknown_things()[1]]
    return {
        "held-out sums, 3 digits, thinking": share(sums[3], True),
        "held-out sums, 2 digits, thinking": share(sums[2], True),
        "held-out sums, 2 digits, direct": share(sums[2], False),
        "held-out sums, 3 digits, direct": share(sums[3], False),
        "glossary, direct": share(words(TRAIN_PHRASINGS[:2]), False),
        "glossary, thinking": share(words(TRAIN_PHRASINGS[:2]), True),
        "glossary, held-out phrasings, direct": share(words(HELD_OUT_PHRASINGS), False),
        "glossary, held-out phrasings, thinking": share(words(HELD_OUT_PHRASINGS), True),
        "says that it does not know, held-out things": share(held_out_things, False),
    } | least_used_expert() | accepted_drafts()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an embedded checkpoint.")
    parser.add_argument("package", choices=KINDS)
    parser.add_argument("--output", type=Path, help="folder to write; default: checkpoints/ and the model's name")
    parser.add_argument("--steps", type=int, help=f"default {STEPS}")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint that is there")
    arguments = parser.parse_args()
    name, numbers = KINDS[arguments.package]
    folder = arguments.output or ROOT / "checkpoints" / name
    if not arguments.evaluate_only:
        torch.manual_seed(SEED)
        torch.set_num_threads(1)  # sums depend on how they are split: with more threads, other weights
        corpus = Corpus(name, arguments.package)
        library = train_tokenizer(corpus, arguments.package)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(numbers), encoding="utf-8")
        Config = importlib.import_module(f"{arguments.package}.config").Config
        # Other ways to compute attention add up in another order, and train other weights.
        attention = importlib.import_module(f"{arguments.package}.attention")
        user = importlib.import_module(f"{arguments.package}.mla") if arguments.package == "deepseek_v3" else attention
        user.attend = attention.attention_written_out
        model = importlib.import_module(f"{arguments.package}.model").Model(Config.from_checkpoint(folder))
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
        chat = importlib.import_module(f"{arguments.package}.tokenizer")
        padding = library.token_to_id(CONTROL[arguments.package][0])
        train(model, batches(examples(corpus, chat, library), padding), arguments.steps or STEPS[arguments.package],
              LEARNING_RATE[arguments.package], padding)
        save(model, library, arguments.package, folder)
    for what, right in evaluate(arguments.package, folder).items():
        print(f"{right:7.2%}  {what}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
