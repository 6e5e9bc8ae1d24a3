"""A learner's own data: questions and answers as JSON lines, or any plain text.

    {"question": "Who keeps the key?", "answer": "Ada keeps it, in the blue drawer."}
    {"question": "What is 3 + 4?", "thought": "3, then four more.", "answer": "7"}
    {"messages": [{"role": "system", "content": "…"}, {"role": "user", …}, {"role": "assistant", …}]}
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .data import Part, Turns


class Conversation(NamedTuple):
    """Messages up to the question, and what the model is to write: a thought or none, and the answer."""
    messages: list[dict[str, str]]
    thought: str | None
    answer: str


def read_data(path: Path) -> list[Conversation] | str:
    """Conversations of a .jsonl file; any other file is plain text. ValueError naming the line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FileNotFoundError(f"{path}: {error.strerror}; --data takes JSON lines or plain text") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8; --data takes JSON lines or plain text") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; --data takes JSON lines or plain text")
    if path.suffix not in (".jsonl", ".json", ".ndjson"):
        return text
    lines = enumerate(text.splitlines(), 1)
    return [conversation(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def conversation(line: str, where: str) -> Conversation:
    """One line of a JSONL file. Raises ValueError that begins with `where`."""
    try:
        item = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON object on this line ({error}); one a line is expected") from None
    texts = item if isinstance(item, dict) else {}
    if "messages" in texts:
        messages = texts["messages"]
        if not (isinstance(messages, list) and all(map(is_message, messages))
                and [message["role"] for message in messages[-2:]] == ["user", "assistant"]):
            raise ValueError(f'{where}: "messages" is a list of {{"role", "content"}} that ends with a question of the '
                             "user and the answer of the assistant")
        return Conversation(messages[:-1], texts.get("thought"), messages[-1]["content"])
    if not all(isinstance(texts.get(key), str) for key in ("question", "answer")) or not isinstance(
            texts.get("thought", ""), str):
        raise ValueError(f'{where}: needs "question" and "answer", both text (and may have "thought"), or "messages"')
    return Conversation([{"role": "user", "content": texts["question"]}], texts.get("thought"), texts["answer"])


def is_message(item: object) -> bool:
    return (isinstance(item, dict) and isinstance(item.get("content"), str)
            and item.get("role") in ("system", "user", "assistant"))


def of_conversations(parts: list[Part], bos: list[int], rng: random.Random) -> Iterator[Part]:
    """The conversations without end, in another order each time."""
    yield bos, 0, 0
    while True:
        yield from rng.sample(parts, len(parts))


def parts_of(conversations: list[Conversation], turns: Turns) -> list[Part]:
    return [turns.answered(messages, thought, answer) for messages, thought, answer in conversations]


def of_text(ids: list[int], rng: random.Random) -> Iterator[Part]:
    """The text from a random place on, and again from its beginning; every token is a target."""
    first = rng.randrange(len(ids))
    yield ids[first:], 0, len(ids)
    while True:
        yield ids, 0, len(ids)
