"""What the embedded checkpoints learn: a glossary, ways to ask about it, small talk, and what to decline.

The words stand in words/*.txt, to be read and corrected; here they become questions with their answers. A person asks
in haste, so the questions are untidy on purpose: no capitals, other spellings, a typing error. Sums are in sums.py.
"""

import random
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .sums import draw_no_sum, draw_sum

WORDS = Path(__file__).parent / "words"

DONT_KNOW = "I do not know that. I explain words of language models, such as RoPE or dropout, and I add small numbers."
ONLY_THIS = "I only know what it is. "
ONLY_ONE = "I only know one of them. "


class Entry(NamedTuple):
    """A word of the glossary; the first of its names is the usual one."""
    names: list[str]
    what: str
    why: str


class Example(NamedTuple):
    """A question, what the model writes in its think block, and the answer."""
    question: str
    thought: str
    answer: str


def read(name: str) -> str:
    return (WORDS / f"{name}.txt").read_text(encoding="utf-8")


@cache
def entries() -> list[Entry]:
    """The glossary: three lines an entry, its names, what it is, why it is there."""
    blocks = [block.splitlines() for block in read("glossary").strip().split("\n\n")]
    return [Entry(names.split("; "), what, why) for names, what, why in blocks]


def glossary() -> list[tuple[list[str], str]]:
    """[(names, answer)]: the answer to "What is …?" for each word."""
    return [(entry.names, entry.what) for entry in entries()]


@cache
def phrasings() -> dict[str, list[str]]:
    """Ways to ask, by what is wanted: {x} stands for a word, {y} for a second one."""
    sections = [section.splitlines() for section in read("questions").strip().split("\n\n")]
    return {head[2:].partition(":")[0]: lines for head, *lines in sections}


def small_talk(name: str, package: str) -> list[tuple[list[str], str]]:
    """[(questions, answer)] for a model called `name` that `package` runs."""
    blocks = [block.splitlines() for block in read("talk").strip().split("\n\n")]
    return [(questions, answer[2:].format(name=name, package=package)) for *questions, answer in blocks]


@cache
def unknown_things() -> tuple[list[str], list[str]]:
    """(trained, held out): every twelfth thing is held out."""
    things = read("unknown").split("\n")[:-1]
    return [x for i, x in enumerate(things) if i % 12], things[::12]


class Corpus:
    """Draws examples at random, each question spelled as a person might."""

    def __init__(self, name: str, package: str):
        self.talk = small_talk(name, package)

    def draw(self, rng: random.Random, thinking: bool) -> Example:
        kinds = {self.word: 55, self.sum: 14, self.unknown: 17, self.small_talk: 9, self.no_sum: 5}
        (kind,) = rng.choices(list(kinds), list(kinds.values()))
        example = kind(rng, thinking)
        return example._replace(question=in_haste(example.question, rng, typing_errors=kind != self.sum))

    def sum(self, rng: random.Random, thinking: bool) -> Example:
        return Example(*draw_sum(rng, thinking))

    def no_sum(self, rng: random.Random, thinking: bool) -> Example:
        return Example(*draw_no_sum(rng))

    def small_talk(self, rng: random.Random, thinking: bool) -> Example:
        questions, answer = rng.choice(self.talk)
        return Example(rng.choice(questions), "The question is about me.", answer)

    def word(self, rng: random.Random, thinking: bool) -> Example:
        """A question about a word of the glossary, or about two."""
        wanted = rng.choices(["what", "explain", "why", "difference", "why_in", "other"], [26, 17, 24, 17, 6, 10])[0]
        phrasing, x, y = loosely(rng.choice(phrasings()[wanted]), rng), *rng.sample(entries(), 2)
        question = ask(phrasing, spell(x, rng), spell(y, rng))
        if wanted == "difference":
            if phrasing.find("{y}") < phrasing.find("{x}"):
                x, y = y, x  # the answer takes them in the order of the question
            thought = f"The words are {x.names[0]} and {y.names[0]}. The question is how they differ."
            return Example(question, thought, f"{x.what} {y.what}")
        sought = {"what": "what it is", "explain": "what it is and why", "other": "something else"}.get(wanted, "why")
        answer = {"what": x.what, "explain": f"{x.what} {x.why}", "other": ONLY_THIS + x.what}.get(wanted, x.why)
        return Example(question, f"The word is {x.names[0]}. The question is {sought}.", answer)

    def unknown(self, rng: random.Random, thinking: bool) -> Example:
        """A question about something that is not in the glossary, and is to be declined."""
        kind, thought = rng.random(), "I was not taught that."
        thing = rng.choice(unknown_things()[0]) if rng.random() < 0.6 else rng.choice([invented_word, crossed])(rng)
        thing = misspelled(thing, rng)
        if kind < 0.38:
            return Example(loosely(rng.choice(phrasings()["off_topic"]), rng), thought, DONT_KNOW)
        if kind < 0.84:
            wanted = rng.choices(["what", "explain", "why", "other", "unknown"], [3, 2, 3, 2, 5])[0]
            return Example(ask(loosely(rng.choice(phrasings()[wanted]), rng), thing), thought, DONT_KNOW)
        other = rng.choice(unknown_things()[0])
        phrasing = loosely(rng.choice(phrasings()[rng.choice(["difference", "difference", "why_in"])]), rng)
        if kind < 0.92:
            return Example(ask(phrasing, thing, other), thought, DONT_KNOW)
        entry = rng.choice(entries())  # one of the two is known
        pair = (thing, spell(entry, rng)) if rng.random() < 0.5 else (spell(entry, rng), thing)
        phrasing = loosely(rng.choice(phrasings()["difference"]), rng)
        return Example(ask(phrasing, *pair), f"The word is {entry.names[0]}. I was not taught the other.",
                       ONLY_ONE + entry.what)


def ask(phrasing: str, x: str, y: str = "") -> str:
    """The question about x (and y), its first letter upper case as a person would write it."""
    question = phrasing.format(x=x, y=y)
    return question[0].upper() + question[1:] if phrasing.startswith("{") and question[:1].islower() else question


def spell(entry: Entry, rng: random.Random) -> str:
    """One of the names as people write it: hyphens, articles and plurals come and go."""
    name = entry.names[0] if rng.random() < 0.4 else rng.choice(entry.names)
    article, _, noun = name.partition(" ") if re.match(r"(a|an|the) ", name) else ("", "", name)
    if rng.random() < 0.25:
        noun = rng.choice([noun.replace("-", " "), noun.replace("-", ""), noun.replace(" ", "-"),
                           noun.replace(" ", ""), noun.replace("_", " "), noun.replace("_", "")])
    if rng.random() < 0.08:
        noun = re.sub(f"(?i)^({PREFIXES})(?=[a-z]{{3}})", rng.choice([r"\1-", r"\1 "]), noun)
    if rng.random() < 0.3:
        noun = noun.replace("iz", "is").replace("vior", "viour").replace("eighbor", "eighbour")  # British
    if article in ("a", "an") and rng.random() < 0.4:
        plural = noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"
        noun, article = rng.choice([(plural, ""), (plural, ""), (noun, ""), (noun, "the"), (noun, "my"),
                                    (plural, "these")])
    elif not article and noun[-1:].islower() and noun[-1] != "s" and rng.random() < 0.08:
        noun += "s"
    elif article and rng.random() < 0.25:
        article = rng.choice(["", "", "a", "this"])
    return f"{article} {misspelled(noun, rng)}".strip()


PREFIXES = "back|over|under|pre|post|fine|non|multi|self|auto|re|hyper|super|sub|de|cross|byte|soft|flash|para|micro"


def loosely(phrasing: str, rng: random.Random) -> str:
    """The same in other words: one is left out, another one slips in, something is said before or after."""
    words = phrasing.split()
    droppable = [i for i, word in enumerate(words) if "{" not in word]
    if len(droppable) > 2 and rng.random() < 0.2:
        del words[rng.choice(droppable)]
    if rng.random() < 0.15:
        words.insert(rng.randrange(len(words) + 1), rng.choice(SLIPS_IN))
    phrasing = " ".join(words)
    if rng.random() < 0.12:
        phrasing = f"{rng.choice(phrasings()['before'])} {phrasing}"
    if rng.random() < 0.12:
        end = rng.choice(["", "", ",", "?", "."])
        phrasing = f"{phrasing.rstrip('?.!')}{end} {rng.choice(phrasings()['after'])}{rng.choice(['', '?', '.'])}"
    return phrasing


SLIPS_IN = ("so really just actually please exactly even now then like maybe kind of basically simply again well also "
            "still anyway the a that this it there all some in our my your model people one do you know").split()
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
GREETINGS = ["hi, ", "Hi, ", "hello, ", "Hello! ", "hey, ", "ok, ", "ok so ", "so ", "and ", "well, ", "please, ",
             "um, ", "quick question: ", "sorry, ", "one more: ", "I wonder: ", "question: ", "hm, ", "thanks. ",
             "cool, "]


def in_haste(question: str, rng: random.Random, typing_errors: bool) -> str:
    """The same question with a greeting, without capitals, without its question mark, with a typing error."""
    if rng.random() < 0.06:
        question = rng.choice(GREETINGS) + question
    if rng.random() < 0.6:
        question = question.lower()
    if rng.random() < 0.5:
        question = question.rstrip("?.!") or question
    if rng.random() < 0.1:
        question = question.replace("What is", "What's").replace("what is", "whats").replace("'", "")
    for _ in range(rng.choice([0] * 16 + [1, 1, 1, 2]) if typing_errors else 0):
        question = mistyped(question, rng)
    return question


def misspelled(name: str, rng: random.Random) -> str:
    """A name with a typing error, at times: where it matters most, and where a name is least familiar."""
    return mistyped(name, rng) if rng.random() < 0.15 else name


def mistyped(text: str, rng: random.Random) -> str:
    """One letter of a longer word is left out, doubled, swapped with the next, or its neighbor on the keyboard."""
    places = [match.start() for match in re.finditer(r"(?<=[A-Za-z])[a-z](?=[a-z])", text)]
    if not places:
        return text
    i = rng.choice(places)
    row = next(row for row in KEYS if text[i] in row)
    near = row[max(0, row.index(text[i]) - 1)] if rng.random() < 0.5 else row[(row.index(text[i]) + 1) % len(row)]
    left_out, doubled, swapped = text[:i] + text[i + 1:], text[:i] + text[i] + text[i:], \
        text[:i] + text[i + 1] + text[i] + text[i + 2:]
    return rng.choice([left_out, doubled, swapped, text[:i] + near + text[i + 1:]])


def crossed(rng: random.Random) -> str:
    """The beginning of one name with the end of another: it sounds familiar, and nobody has explained it."""
    first, last = (bare(rng.choice(entry.names)) for entry in rng.sample(entries(), 2))
    if " " in first and " " in last or rng.random() < 0.5:
        cross = f"{first.split()[0]} {last.split()[-1]}"
    else:
        cross = first.split()[0][:max(3, len(first) // 2)] + last.split()[-1][-max(3, len(last) // 2):]
    return invented_word(rng) if cross.lower().replace("-", " ") in known_names() else cross


def bare(name: str) -> str:
    """A name without its article."""
    return re.sub(r"^(a|an|the) ", "", name)


@cache
def known_names() -> set[str]:
    """Every name of the glossary, without article, capitals and hyphens."""
    return {bare(name).lower().replace("-", " ") for entry in entries() for name in entry.names}


def invented_word(rng: random.Random) -> str:
    """A word that nobody has heard of, so that the model learns to say so of any word."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice(["a", "e", "i", "o", "u", "ai", "ee", "ou"])
                 + rng.choice(["", "", "n", "r", "l", "s", "t", "x"]) for _ in range(rng.choice([1, 2, 2, 3]))]
    word = "".join(syllables)
    return rng.choice([word, word, f"a {word}", f"the {word}", word.capitalize(), word[:4].upper()])
