"""What an embedded checkpoint has learned: shares of right answers on questions that it was not trained on."""

import importlib
import random
from collections.abc import Iterator
from pathlib import Path

from qwen3.tokenizer import END_THINK  # noqa: I001  before torch: see qwen3/__init__.py

import torch

from .corpus import DONT_KNOW, ask, entries, unknown_things
from .data import SEED
from .grade import judge, questions
from .sums import is_held_out

WORDS = ("what", "explain", "why", "difference", "other")  # kinds of questions about a word of the glossary
GOOD = ("right", "half")
TURNS = 24  # of each conversation, in words/conversations.jsonl too


class Examinee:
    """A saved checkpoint that answers many questions side by side, greedily."""

    def __init__(self, package: str, folder: Path):
        self.package = package
        self.model = importlib.import_module(f"{package}.weights").load_model(folder)
        self.generation = importlib.import_module(f"{package}.generate")
        self.tokenizer = importlib.import_module(f"{package}.tokenizer").Tokenizer.from_checkpoint(folder)
        self.stop_ids = self.model.config.eos_token_id

    def answers(self, conversations: list[list[dict[str, str]] | str], thinking: bool) -> list[str]:
        """Of questions, or of conversations that end with one."""
        texts = []
        for first in range(0, len(conversations), 64):
            part = [[{"role": "user", "content": each}] if isinstance(each, str) else each
                    for each in conversations[first:first + 64]]
            prompts = [self.tokenizer.chat(messages, thinking) for messages in part]
            answers = self.generation.generate_batch(self.model, prompts, max_new_tokens=200, stop_ids=self.stop_ids)
            texts += [self.tokenizer.decode(ids).rpartition(END_THINK)[2].lstrip("\n") for ids in answers]
        return texts

    def share(self, pairs: list[tuple[str, str]], thinking: bool) -> float:
        """Of (question, answer), how many are answered exactly so."""
        answers = self.answers([question for question, _ in pairs], thinking)
        return sum(given == answer for given, (_, answer) in zip(answers, pairs)) / len(pairs)

    def verdicts(self, items: list[dict], thinking: bool) -> list[str]:
        return [judge(item, answer)
                for item, answer in zip(items, self.answers([item["question"] for item in items], thinking))]

    def converse(self, talks: list[list[dict]], thinking: bool) -> list[list[str]]:
        """Verdicts, one list for each turn: all talks are held side by side, each with the model's own answers."""
        histories, turns = [[] for _ in talks], []
        for items in zip(*talks):
            for history, item in zip(histories, items):
                history.append({"role": "user", "content": item["question"]})
            answers = self.answers(histories, thinking)
            for history, answer in zip(histories, answers):
                history.append({"role": "assistant", "content": answer})
            turns.append([judge(item, answer) for item, answer in zip(items, answers)])
        return turns


def groups(items: list, size: int) -> Iterator[list]:
    for first in range(0, len(items), size):
        yield items[first:first + size]


def held_out(package: str, folder: Path, thinking: bool) -> list[str]:
    """Verdicts on the questions in people's own words."""
    return Examinee(package, folder).verdicts(questions("heldout"), thinking)


def held_out_sums(digits: int, count: int, numbers: int = 2) -> list[tuple[str, str]]:
    """Sums that were never asked in training; of three numbers that holds for the first two."""
    rng, pairs = random.Random(SEED + digits), []
    while len(pairs) < count:
        terms = [rng.randrange(10 ** digits) for _ in range(numbers)]
        if is_held_out(*terms[:2]):
            pairs.append((f"What is {' + '.join(map(str, terms))}?", str(sum(terms))))
    return pairs


def glossary_talks(count: int) -> list[list[dict]]:
    """Conversations of 24 questions about words drawn at random."""
    rng = random.Random(SEED)
    return [[{"question": f"What is {entry.names[0]}?", "kind": "what", "about": entry.names[:1]}
             for entry in rng.sample(entries(), TURNS)] for _ in range(count)]


def evaluate(package: str, folder: Path) -> dict[str, float]:
    """The README's table: what -> share."""
    examinee, result = Examinee(package, folder), {}
    for what, digits, numbers in (("2 digits", 2, 2), ("3 digits", 3, 2), ("4 digits", 4, 2),
                                  ("three of 2 digits", 2, 3)):
        result[f"held-out sums, {what}, thinking"] = examinee.share(held_out_sums(digits, 300, numbers), True)
    one_digit = [(f"What is {a} + {b}?", str(a + b)) for a in range(10) for b in range(10)]
    result["all sums of one digit, direct"] = examinee.share(one_digit, False)
    plain, exam = [(f"What is {entry.names[0]}?", entry.what) for entry in entries()], questions("heldout")
    for thinking in (False, True):
        mode = "thinking" if thinking else "direct"
        result[f"glossary, {mode}"] = examinee.share(plain, thinking)
        verdicts = examinee.verdicts(exam, thinking)
        known = [verdict for verdict, item in zip(verdicts, exam) if item["kind"] in WORDS]
        result[f"a word in own words, {mode}: right"] = known.count("right") / len(known)
        result[f"a word in own words, {mode}: right or half right"] = sum(map(known.count, GOOD)) / len(known)
        result[f"anything in own words, {mode}: wrong"] = verdicts.count("wrong") / len(verdicts)
    turns = examinee.converse(glossary_talks(20), False)
    worst = min(turn.count("right") / len(turn) for turn in turns)
    result["24 glossary questions in one conversation: right, worst turn"] = worst
    written = sum(examinee.converse(list(groups(questions("conversations"), TURNS)), False), [])
    good = sum(map(written.count, GOOD)) / len(written)
    result["24 mixed questions in one conversation: right or half right"] = good
    unknown = [(ask("What is {x}?", thing), DONT_KNOW) for thing in unknown_things()[1]]
    result["says that it does not know, held-out things"] = examinee.share(unknown, False)
    mixed = [question for question, _ in held_out_sums(3, 40)]
    mixed += [item["question"] for item in exam if item["kind"] in WORDS]
    # One after the other, which takes long: every third of them for the experts, every twelfth for the drafts.
    return result | least_used_expert(examinee, mixed[::3]) | accepted_drafts(examinee, mixed[::12])


def least_used_expert(examinee: Examinee, asked: list[str]) -> dict[str, float]:
    """One prompt at a time: padding would be counted as tokens."""
    if examinee.package == "qwen3":
        return {}
    model, tokenizer = examinee.model, examinee.tokenizer
    routing = importlib.import_module(f"{examinee.package}.engine.expert_picture").Routing(model)
    with torch.inference_mode():
        for question, answer in zip(asked, examinee.answers(asked, False)):
            prompt = tokenizer.chat([{"role": "user", "content": question}], thinking=False)
            ids = torch.tensor([prompt + tokenizer.encode(answer)])
            hidden = model.model(ids)
            if examinee.package == "deepseek_v3":
                model.mtp(ids[:, 1:], hidden[:, :-1])
    return {"least used expert, of its fair share": min(
        float(counts.min()) * len(counts) / float(counts.sum()) for counts in routing.counts.values())}


def accepted_drafts(examinee: Examinee, asked: list[str]) -> dict[str, float]:
    """What -> the share of drafts that were kept, with thinking and without; {} for other packages."""
    if examinee.package != "deepseek_v3":
        return {}
    shares = {}
    for thinking in (True, False):
        acceptance = importlib.import_module("deepseek_v3.speculative").Acceptance()
        for question in asked:
            prompt = examinee.tokenizer.chat([{"role": "user", "content": question}], thinking)
            list(examinee.generation.generate(examinee.model, prompt, max_new_tokens=200, speculative=True,
                                              stop_ids=examinee.stop_ids, acceptance=acceptance))
        shares[f"drafts accepted, {'thinking' if thinking else 'direct'}"] = acceptance.accepted / acceptance.drafted
    return shares


def show_table(package: str, folder: Path) -> None:
    for what, right in evaluate(package, folder).items():
        print(f"{right:7.2%}  {what}", flush=True)
