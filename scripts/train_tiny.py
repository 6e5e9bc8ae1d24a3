"""Trains the embedded checkpoints: uv run python scripts/train_tiny.py qwen3 | qwen3_moe [--output FOLDER]

Real models, a thousandth of the size: they learn the glossary and small talk of tiny_corpus.py and sums of
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

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from qwen3.tokenizer import END_THINK, IM_END, IM_START, THINK, Control, Tokenizer  # noqa: E402
from scripts.tiny_corpus import (DONT_KNOW, HELD_OUT_PHRASINGS, NO_SUMS, ONLY_ADD, TRAIN_PHRASINGS,  # noqa: E402
                                 UNKNOWN_QUESTIONS, ask, glossary, small_talk, unknown_things)

SEED = 20
STEPS = {"qwen3": 2600, "qwen3_moe": 2000}
BATCH, TOKENS = 96, 9600  # rows at most, and tokens at most, of one batch
LEARNING_RATE = {"matrices": 1e-2, "others": 3e-3}
BALANCE = 0.01  # weight of the load-balancing loss
VOCABULARY = 1024
ENDOFTEXT = "<|endoftext|>"
PADDING = VOCABULARY - 5  # the id of ENDOFTEXT, which no conversation contains

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
# package -> the checkpoint's name, its config, the class of the model
KINDS = {"qwen3": ("Qwen3-Tiny", QWEN3, "Qwen3"), "qwen3_moe": ("Qwen3-MoE-Tiny", QWEN3_MOE, "Qwen3Moe")}

# As Qwen3's own: contractions, words with a leading space, digits one by one, punctuation, white space.
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# Other programs render conversations with this; it says what the published template says of plain turns.
CHAT_TEMPLATE = """\
{%- set ns = namespace(question=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if ns.question >= 0 and loop.index0 > ns.question and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

SUM_PHRASINGS = ["What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "What is {a} plus {b}?", "Add {a} and {b}.",
                 "How much is {a} + {b}?", "Compute {a} + {b}.", "{a} + {b} = ?", "Can you add {a} and {b}?",
                 "What is the sum of {a} and {b}?"]
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a teacher.", "Answer in one sentence.", "Be brief."]


def is_held_out(a: int, b: int) -> bool:
    """One pair in ten, spread evenly and without a state that could get lost."""
    return (a * 7919 + b * 104729) // 10 % 10 == 3


def carry_through(a: int, b: int) -> str:
    """Addition as it is done on paper, one digit a line, from the right."""
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
        carry = total // 10
    return "\n".join(lines)


class Corpus:
    """Draws (question, thought, answer) at random; sums without thinking mostly of one or two digits, which it can learn."""

    def __init__(self, name: str, package: str):
        self.glossary, self.talk = glossary(), small_talk(name, package)
        self.unknown = unknown_things()[0]

    def draw(self, rng: random.Random, thinking: bool) -> tuple[str, str, str]:
        kind = rng.random()
        if kind < 0.68:
            return self.draw_sum(rng, thinking)
        if kind < 0.91:
            names, answer = rng.choice(self.glossary)
            question = ask(rng.choice(TRAIN_PHRASINGS), rng.choice([names[0], rng.choice(names)]))
            thought = f"The question is about {names[0]}."
        elif kind < 0.945:
            questions, answer = rng.choice(self.talk)
            question, thought = rng.choice(questions), "The question is about me."
        elif kind < 0.96:
            question = rng.choice(NO_SUMS).format(a=rng.randrange(1000), b=rng.randrange(1000))
            thought, answer = "I was not taught that.", ONLY_ADD
        else:
            phrasing = rng.choice(TRAIN_PHRASINGS[:20] + UNKNOWN_QUESTIONS * 2)
            question, thought, answer = ask(phrasing, rng.choice(self.unknown)), "I was not taught that.", DONT_KNOW
        # People type in haste.
        if rng.random() < 0.15:
            question = question.lower()
        if rng.random() < 0.15:
            question = question.rstrip("?.!")
        return question, thought, answer

    def draw_sum(self, rng: random.Random, thinking: bool) -> tuple[str, str, str]:
        while True:
            a, b = (rng.randrange(10 ** rng.choice([1, 2, 2, 3, 3] if thinking else [1, 2, 2, 2, 3])) for _ in "ab")
            if not is_held_out(a, b):
                return rng.choice(SUM_PHRASINGS).format(a=a, b=b), carry_through(a, b), str(a + b)


def train_tokenizer(corpus: Corpus) -> tokenizers.Tokenizer:
    """Byte-level BPE on the corpus: Qwen3's normaliser, pieces and control tokens with a small vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(text, special=text not in (THINK, END_THINK), normalized=False)
               for text in (ENDOFTEXT, IM_START, IM_END, THINK, END_THINK)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(control), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    rng = random.Random(SEED)
    text = ("\n".join(corpus.draw(rng, thinking=True)) for _ in range(20000))
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens(control)  # behind the vocabulary, as in the published files
    return tokenizer


def examples(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) without end: both modes, some with a system prompt or earlier turns."""
    rng = random.Random(SEED)
    while True:
        messages = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for _ in range(rng.choice([0] * 28 + [1, 2, 4, 8])):
            question, _, answer = corpus.draw(rng, thinking=False)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        thinking = rng.random() < 0.4
        question, thought, answer = corpus.draw(rng, thinking)
        messages.append({"role": "user", "content": question})
        opening = [Control(THINK), f"\n{thought}\n", Control(END_THINK), "\n\n"] if thinking else []
        yield tokenizer.chat(messages, thinking), tokenizer.join([*opening, answer, Control(IM_END)])


def batches(stream: Iterator[tuple[list[int], list[int]]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids (B, T), targets (B, T), -100 where nothing is to be learned); rows of like length together."""
    rng = random.Random(SEED)
    while True:
        rows = sorted((next(stream) for _ in range(16 * BATCH)), key=lambda row: len(row[0]) + len(row[1]))
        groups = []
        while rows:  # from the longest
            fit = min(BATCH, TOKENS // (len(rows[-1][0]) + len(rows[-1][1])))
            groups.append(rows[-fit:])
            del rows[-fit:]
        for group in rng.sample(groups, len(groups)):
            T = max(len(prompt) + len(answer) for prompt, answer in group) - 1
            ids, targets = torch.full((len(group), T), PADDING), torch.full((len(group), T), -100)
            for row, (prompt, answer) in enumerate(group):
                whole = torch.tensor(prompt + answer)
                ids[row, :len(whole) - 1] = whole[:-1]
                targets[row, len(prompt) - 1:len(whole) - 1] = whole[len(prompt):]
            yield ids, targets


class Balance:
    """The load-balancing loss, E · Σ_e f_e · P_e averaged over the layers (arXiv:2101.03961, eq. 4-6).

    f_e is the share of the choices that fell on expert e, P_e its mean probability; both over the whole batch and
    not one sequence, as Qwen3 has it (arXiv:2505.09388, section 2; arXiv:2501.11873). 1 where all are used alike.
    """

    def __init__(self, model: torch.nn.Module):
        self.losses, self.real = [], None
        for module in model.modules():
            if type(module).__name__ == "Router":
                module.register_forward_hook(self.add)

    def add(self, router: torch.nn.Module, inputs: tuple[torch.Tensor], out: tuple[torch.Tensor, torch.Tensor]) -> None:
        scores, chosen = router.scores(inputs[0][self.real]), out[1][self.real]
        share = torch.bincount(chosen.flatten(), minlength=scores.shape[1]) / chosen.numel()
        self.losses.append(scores.shape[1] * (share * scores.mean(0)).sum())

    def of(self, ids: torch.Tensor) -> "Balance":
        """For a forward of these ids; padding does not count."""
        self.losses, self.real = [], (ids != PADDING).flatten()
        return self

    def loss(self) -> torch.Tensor | float:
        return sum(self.losses) / len(self.losses) if self.losses else 0.0


def train(model: torch.nn.Module, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """Muon for the matrices inside (Moonlight, arXiv:2502.16982), AdamW for the rest; a short warm-up, then down to zero."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(inside, lr=LEARNING_RATE["matrices"], weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE["others"], betas=(0.9, 0.98), weight_decay=0, fused=True)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, (steps - step) / max(steps - 100, 1))) for optimizer in optimizers]
    started, mean, balance = time.monotonic(), 0.0, Balance(model)
    for step in range(1, steps + 1):
        ids, targets = next(stream)
        wanted = targets != -100
        balance.of(ids)
        with torch.autocast("cpu", torch.bfloat16):  # products in bfloat16, weights and sums in float32
            # The head is applied only where there is something to learn.
            x = model.model(ids)[wanted]
            logits = model.lm_head(x) if model.lm_head is not None else F.linear(x, model.model.embed_tokens.weight)
            loss = F.cross_entropy(logits, targets[wanted])
        model.zero_grad()
        (loss + BALANCE * balance.loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for update in (*optimizers, *schedules):
            update.step()
        mean += (loss.item() - mean) / min(step, 50)
        if step % 50 == 0 or step == steps:
            elapsed = time.monotonic() - started
            print(f"\rstep {step}/{steps}  loss {mean:.4f}  {elapsed / 60:.1f} min, "
                  f"{elapsed * (steps - step) / step / 60:.1f} to go ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def save(model: torch.nn.Module, tokenizer: tokenizers.Tokenizer, config: dict, folder: Path) -> None:
    """The five files of a published checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"bos_token_id": tokenizer.token_to_id(ENDOFTEXT), "eos_token_id": tokenizer.token_to_id(IM_END)}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": IM_END, "pad_token": ENDOFTEXT,
                "model_max_length": config["max_position_embeddings"], "chat_template": CHAT_TEMPLATE}
    generation = {"do_sample": False, "eos_token_id": [ends["eos_token_id"], ends["bos_token_id"]],
                  "pad_token_id": ends["bos_token_id"]}
    for name, values in (("config", config | ends), ("tokenizer_config", settings), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def evaluate(package: str, folder: Path) -> dict[str, float]:
    """Shares of exactly right answers of the saved checkpoint, on sums and phrasings that it never saw."""
    model = importlib.import_module(f"{package}.weights").load_model(folder)
    generate_batch = importlib.import_module(f"{package}.generate").generate_batch
    tokenizer = importlib.import_module(f"{package}.tokenizer").Tokenizer.from_checkpoint(folder)
    stop_ids = model.config.eos_token_id

    def share(questions: list[tuple[str, str]], thinking: bool) -> float:
        right = 0
        for first in range(0, len(questions), 64):
            part = questions[first:first + 64]
            prompts = [tokenizer.chat([{"role": "user", "content": question}], thinking) for question, _ in part]
            answers = generate_batch(model, prompts, max_new_tokens=120, stop_ids=stop_ids)
            texts = [tokenizer.decode(ids).rpartition(f"{END_THINK}\n\n")[2] for ids in answers]
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
            for question, answer in sums[3][:100] + sums[2][:100] + words(HELD_OUT_PHRASINGS[:2]):
                prompt = tokenizer.chat([{"role": "user", "content": question}], thinking=False)
                model(torch.tensor([prompt + tokenizer.encode(answer)]))
        return {"least used expert, of its fair share": min(
            float(counts.min()) * len(counts) / float(counts.sum()) for counts in routing.counts.values())}

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
    } | least_used_expert()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an embedded checkpoint.")
    parser.add_argument("package", choices=KINDS)
    parser.add_argument("--output", type=Path, help="folder to write; default: checkpoints/ and the model's name")
    parser.add_argument("--steps", type=int, help=f"default {STEPS}")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the checkpoint that is there")
    arguments = parser.parse_args()
    name, numbers, kind = KINDS[arguments.package]
    folder = arguments.output or ROOT / "checkpoints" / name
    if not arguments.evaluate_only:
        torch.manual_seed(SEED)
        torch.set_num_threads(1)  # sums depend on how they are split: with more threads, other weights
        corpus = Corpus(name, arguments.package)
        library = train_tokenizer(corpus)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(numbers), encoding="utf-8")
        Config = getattr(importlib.import_module(f"{arguments.package}.config"), f"{kind}Config")
        # The gradient of the fused attention takes half of the time on a CPU; at this size the definition is faster.
        layers = importlib.import_module(f"{arguments.package}.layers")
        layers.attention_fused = layers.attention_written_out
        model = getattr(importlib.import_module(f"{arguments.package}.model"), kind)(Config.from_checkpoint(folder))
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
        train(model, batches(examples(corpus, Tokenizer(library, "switch"))),
              arguments.steps or STEPS[arguments.package])
        save(model, library, numbers, folder)
    for what, right in evaluate(arguments.package, folder).items():
        print(f"{right:7.2%}  {what}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
