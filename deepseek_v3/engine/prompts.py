"""A file of prompts, for --batch: what a line may say, each checked before anything is loaded.

    {"prompt": "What is RoPE?", "id": "rope", "temperature": 0.6, "seed": 7}
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is RoPE?"}]}
    "What is RoPE?"

A file whose name ends with .txt has one prompt a line, as it stands. Empty lines are passed over.
"""

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import SAMPLING
from .fields import plain, short
from .processes import on_first

WHOLE = ("seed", "max_new_tokens", "top_k")
SETTINGS = ("seed", "max_new_tokens", *SAMPLING)
KEYS = ("prompt", "messages", "id", *SETTINGS, "metadata")
KINDS = {"prompt": (str, "text"), "messages": (list, "a list"), "id": ((str, int), "text or a whole number")}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of the file; `settings` are those that it has of its own."""

    line: int  # from 1
    messages: list[dict[str, str]]
    is_text: bool  # a "prompt", which a Base checkpoint continues
    id: str | int | None = None
    settings: dict[str, float] = field(default_factory=dict)
    metadata: object = None


def read_prompts(name: str) -> tuple[list[Prompt], str]:
    """(The prompts of a file, "-" for standard input; a hash of it). ValueError names every line that is no prompt."""
    shown = "standard input" if name == "-" else name if len(name) <= 80 else f"{name[:38]}…{name[-40:]}"
    try:
        raw = on_first(lambda: sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes())
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown}, line {raw[:error.start].count(10) + 1}: not UTF-8; save the file in that "
                         "encoding") from None
    except (OSError, AttributeError) as error:  # a closed standard input is None
        why = getattr(error, "strerror", None) or "it is closed"
        raise ValueError(f"{shown}: the prompts cannot be read ({why})") from None
    prompts, wrong, ids = [], {}, {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                prompt = Prompt(number, asked(line.rstrip("\r")), True) if name.lower().endswith(".txt") else (
                    prompt_of(line, number))
                if prompt.id is not None and ids.setdefault(prompt.id, number) != number:
                    raise ValueError(f"the id {short(prompt.id)} is line {ids[prompt.id]}'s as well")
                prompts.append(prompt)
            except ValueError as error:
                wrong[number] = str(error)
    if wrong:
        raise bad_lines(shown, wrong)
    if not prompts:
        raise ValueError(f'{shown} holds no prompt; write one a line, such as {{"prompt": "What is RoPE?"}}')
    return prompts, hashlib.sha256(raw).hexdigest()


def bad_lines(name: str, wrong: dict[int, str]) -> ValueError:
    """One sentence for all lines that are wrong: the first one's reason, the numbers of the others."""
    (first, why), *others = wrong.items()
    more = [str(number) for number, _ in others]
    more = f" (lines {', '.join(more[:5])}{', …' if more[5:] else ''} are wrong too)" if more else ""
    return ValueError(f"{name}, line {first}: {why[:160]}{more}")


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def no_twice(pairs: list[tuple]) -> dict:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def prompt_of(line: str, number: int) -> Prompt:
    """A line of JSON as a prompt; ValueError says what is wrong with it."""
    try:
        values = json.loads(line, object_pairs_hook=no_twice)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno}); prompts in plain text stand in a file "
                         "named .txt") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deep)") from None
    values = {"prompt": values} if isinstance(values, str) else values
    if not isinstance(values, dict):
        raise ValueError('expected an object such as {"prompt": "…"}, or a text')
    values = {key: value for key, value in values.items() if value is not None}
    if unknown := values.keys() - set(KEYS):
        raise ValueError(f"{plain(min(unknown))} is not known; keys are {', '.join(KEYS[:-1])} and metadata, which is "
                         "only copied")
    if ("prompt" in values) == ("messages" in values):
        raise ValueError('expected either "prompt" or "messages"')
    for key, (kind, what) in KINDS.items():
        if key in values and (not isinstance(values[key], kind) or isinstance(values[key], bool)):
            raise ValueError(f"{key} is {short(values[key])}, expected {what}")
    messages = values.get("messages") or asked(values.get("prompt"))
    if "messages" in values and not values["messages"]:
        raise ValueError("messages is empty, expected at least a question")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"a message is {short(message)}, expected an object with role and content")
    check_text(messages)
    settings = {key: setting(key, values[key]) for key in SETTINGS if key in values}
    return Prompt(number, messages, "prompt" in values, values.get("id"), settings, values.get("metadata"))


def check_text(messages: list[dict[str, str]]) -> None:
    texts = [message.get(key) for message in messages for key in ("content", "reasoning_content")]
    texts = [text for text in texts if isinstance(text, str)]  # anything else is refused with the message's role
    if not any(text.strip() for text in texts):
        raise ValueError("the prompt is empty")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is no text: it has half of a surrogate pair (\\ud800 to \\udfff)") from None


def setting(key: str, value: object) -> float:
    """Its range is checked later, together with the flags."""
    if isinstance(value, bool) or not isinstance(value, int if key in WHOLE else (int, float)):
        raise ValueError(f"{key} is {short(value)}, expected a {'whole ' if key in WHOLE else ''}number")
    return value


def seed_of(seed: int, index: int) -> int:
    """The seed of a prompt that has none of its own: 32 bits that other prompts and other seeds do not share."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:4], "big")

