"""What an embedded checkpoint has learned: shares of right answers on questions that it was not trained on."""

import importlib
import random
from pathlib import Path

from qwen3.tokenizer import END_THINK  # noqa: I001  before torch: see qwen3/__init__.py

import torch

from .corpus import DONT_KNOW, HELD_OUT_PHRASINGS, TRAIN_PHRASINGS, ask, glossary, unknown_things
from .data import SEED, SUM_PHRASINGS, is_held_out


def evaluate(package: str, folder: Path) -> dict[str, float]:
    """Shares of exactly right answers of the saved checkpoint, on sums and phrasings held out of training."""
    model = importlib.import_module(f"{package}.weights").load_model(folder)
    generation = importlib.import_module(f"{package}.generate")
    tokenizer = importlib.import_module(f"{package}.tokenizer").Tokenizer.from_checkpoint(folder)
    stop_ids = model.config.eos_token_id

    def share(questions: list[tuple[str, str]], thinking: bool) -> float:
        right = 0
        for first in range(0, len(questions), 256):
            part = questions[first:first + 256]
            prompts = [tokenizer.chat([{"role": "user", "content": question}], thinking) for question, _ in part]
            answers = generation.generate_batch(model, prompts, max_new_tokens=120, stop_ids=stop_ids)
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
        """One prompt at a time: padding would be counted as tokens."""
        if package == "qwen3":
            return {}
        routing = importlib.import_module(f"{package}.engine.expert_picture").Routing(model)
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
            acceptance = importlib.import_module("deepseek_v3.speculative").Acceptance()
            for question, _ in mixed[::4]:
                prompt = tokenizer.chat([{"role": "user", "content": question}], thinking)
                list(generation.generate(model, prompt, max_new_tokens=120, stop_ids=stop_ids, speculative=True,
                                         acceptance=acceptance))
            mode = "thinking" if thinking else "direct"
            shares[f"drafts accepted, {mode}"] = acceptance.accepted / acceptance.drafted
        return shares

    mixed = sums[3][:100] + sums[2][:100] + words(HELD_OUT_PHRASINGS[:2])
    held_out_things = [(ask(phrasing, thing), DONT_KNOW)
                       for phrasing in TRAIN_PHRASINGS[:3] for thing in unknown_things()[1]]
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
