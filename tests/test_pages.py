"""The three lessons can be read in an evening each: what is counted here is what a reader stumbles over.

Prose is what is left of a page without code, formulas, tables, headings and pictures. A sentence ends at . ? or !, and
with its paragraph or list item.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {package: (ROOT / package / "README.md").read_text("utf-8")
         for package in ("qwen3", "qwen3_moe", "deepseek_v3")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
WORD = re.compile(r"[\w’'.,\-/+]*\w")
ALIKE = 8  # words in a row that stand in two pages are told twice


def paragraphs(page: str) -> list[str]:
    page = FENCE.sub("", re.sub(r"<!--.*?-->", "", page, flags=re.S))
    page = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", page)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    page = re.sub(r"</?\w+[^>]*>", "\n\n", page)
    found = []
    for part in re.split(r"\n\s*\n", page):
        lines = [line for line in part.split("\n") if line.strip() and not line.startswith("|")]
        if not lines or lines[0].startswith(("#", "    ")):
            continue
        for line in lines:
            item = re.match(r"\s*([*\-]|\d+\.)\s+", line)
            if item or line is lines[0]:
                found.append("")
            found[-1] += " " + line[item.end() if item else 0:].strip()
    return [re.sub(r"`[^`]*`", "code", text).replace("*", "") for text in found]


def sentences(page: str) -> list[str]:
    found = []
    for text in paragraphs(page):
        text = re.sub(r"\b(e\.g|i\.e|et al|eq|cf|vs)\.", r"\1", text)
        found += re.split(r"(?<=[.!?])[\")”]*\s+(?=[A-Z0-9\"“(]|code)", text)
    return found


def words(text: str) -> list[str]:
    return WORD.findall(text)


def told_twice(page: str, others: list[str]) -> float:
    """The share of a page's words that are part of eight in a row which stand in another page too."""
    def runs(text: str) -> tuple[list[str], list[tuple[str, ...]]]:
        every = [word.lower() for word in words(" ".join(paragraphs(text)))]
        return every, [tuple(every[i:i + ALIKE]) for i in range(len(every) - ALIKE + 1)]

    every, own = runs(page)
    known, covered = {run for other in others for run in runs(other)[1]}, set()
    for i, run in enumerate(own):
        if run in known:
            covered.update(range(i, i + ALIKE))
    return len(covered) / len(every)


def words_before_the_forward(page: str) -> int:
    for block in FENCE.finditer(page):
        if block[1] == "python" and "lm_head" in block[2]:
            return len(words(" ".join(paragraphs(page[:block.start()]))))
    raise AssertionError("no python block of the page makes logits")


@pytest.mark.parametrize("package", PAGES)
def test_a_page_is_read_in_an_evening(package):
    page = PAGES[package]
    long = {sentence: count for sentence in sentences(page) if (count := len(words(sentence))) > 30}
    assert max(long.values(), default=0) <= 45, max(long, key=long.get)
    assert len(long) <= 0.05 * len(sentences(page)), "\n".join(long)
    unfolded = re.sub(r"<details>.*?</details>", "", page, flags=re.S)  # what is folded may be skipped
    assert 3500 <= len(words(" ".join(paragraphs(unfolded)))) <= 5000
    assert words_before_the_forward(page) <= 300
    assert page.count("![") >= 8 and page.count("**Try it") >= 8
    assert told_twice(page, [PAGES[other] for other in PAGES if other != package]) <= 0.25


def test_the_counts_count():
    page = ("# Head\n\nOne two. Three\nfour `five six`?\n\n* a b\n* c\n\n    a formula\n\n| t | u |\n|---|---|\n\n"
            "![p q](x.svg)\n\n```python\nlm_head\n```\n\n[r s](t) <details>u</details>\n")
    assert [len(words(sentence)) for sentence in sentences(page)] == [2, 3, 2, 1, 2, 1]
    assert words_before_the_forward(page) == 8
    assert told_twice("a b c d e f g h i", ["z a b c d e f g h"]) == 8 / 9
