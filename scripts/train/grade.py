"""Judging answers to questions in a person's own words.

The questions in words/heldout.jsonl and words/conversations.jsonl were written apart from the generator, and none is
trained on. Each says which words it is about and what is wanted. Since the model has only learned whole sentences, an
answer can be compared with those that would do:

    right     what was asked for
    half      something true of the right word, but not what was asked for; a joke where nothing is known
    honest    it says that it does not know, or talks about itself
    wrong     another word, another sum, or no sentence that it was taught
"""

import json
from functools import cache

from .corpus import DONT_KNOW, ONLY_ONE, ONLY_THIS, WORDS, entries, small_talk
from .sums import ONLY_ADD, TOO_LONG

HONEST = {DONT_KNOW, ONLY_ADD, TOO_LONG}
VERDICTS = ("right", "half", "honest", "wrong")


def questions(name: str) -> list[dict]:
    """The questions of words/NAME.jsonl: "question", "kind", "about" (first names), "answer" (of a sum).

    Those about a word that somebody has taken out of the glossary are left out.
    """
    items = [json.loads(line) for line in (WORDS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    names = {entry.names[0] for entry in entries()}
    return [item for item in items if names.issuperset(item["about"])]


@cache
def talk() -> set[str]:
    return {answer for package in ("qwen3", "qwen3_moe", "deepseek_v3")
            for name in ("Qwen3-Tiny", "Qwen3-MoE-Tiny", "DeepSeek-V3-Tiny")
            for _, answer in small_talk(name, package)}


def judge(item: dict, answer: str) -> str:
    """One of VERDICTS."""
    kind, by_name = item["kind"], {entry.names[0]: entry for entry in entries()}
    about = [by_name[name] for name in item["about"]]
    if kind == "sum":
        return "right" if answer == item["answer"] else "honest" if answer in HONEST else "wrong"
    if kind in ("unknown", "not_a_sum"):
        return "right" if answer in HONEST else "half" if answer in talk() else "wrong"
    if kind == "chat":
        return "right" if answer in talk() else "honest" if answer in HONEST else "wrong"
    if kind == "difference":
        x, y = about
        if answer in (f"{x.what} {y.what}", f"{y.what} {x.what}"):
            return "right"
    else:
        x = about[0]
        right = {"what": [x.what, f"{x.what} {x.why}"], "explain": [x.what, x.why, f"{x.what} {x.why}"],
                 "why": [x.why, f"{x.what} {x.why}"], "other": [ONLY_THIS + x.what, x.what, DONT_KNOW]}[kind]
        if answer in right:
            return "right"
    if any(answer in (e.what, e.why, f"{e.what} {e.why}", ONLY_THIS + e.what, ONLY_ONE + e.what) for e in about):
        return "half"
    taught = {sentence for entry in entries() for sentence in (entry.what, entry.why)}
    compares = taught.issuperset(in_two(answer))  # two words, of which one was asked about
    if compares and any(entry.what in answer for entry in about):
        return "half"
    return "honest" if answer in HONEST or answer in talk() else "wrong"


def in_two(answer: str) -> list[str]:
    """The answer taken apart where one taught sentence ends."""
    for entry in entries():
        for sentence in (entry.what, entry.why):
            if answer.startswith(sentence):
                return [sentence, answer[len(sentence) + 1:]]
    return [answer]


def summary(verdicts: list[str]) -> str:
    """"right 81 %, half 6 %, honest 9 %, wrong 4 %"."""
    return ", ".join(f"{each} {100 * verdicts.count(each) / len(verdicts):.0f} %" for each in VERDICTS)
