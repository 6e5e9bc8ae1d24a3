"""Which chat format a checkpoint has: by its template (read, never run), by the user's word, or by its vocabulary.

    1. what the user names (--chat-format) is taken
    2. a template each statement of which is known (template_shapes.py) is that format, exactly
    3. a template of which only the opening is known is taken for the nearest format, with a note
    4. a Base checkpoint, a strange template or none: plain text, with a note; nothing is refused

Notes are lines for standard error.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import tokenizers

from .chat_formats import (ASSISTANT, END_THINK, FORMATS, IM_MIDDLE, IM_START, MARKERS, NEAREST, THINK, USER, Format,
                           named)
from .fields import read_json
from .template_expressions import STRING, NotUnderstood
from .template_reader import read_template
from .template_shapes import recognise, thinks

# Templates that are known as a whole, the embedded checkpoints': sha256 of the text, its white space evened out.
BY_HASH = {
    "a0579aab1b7be420e3815964abd8e9cfc5c932522e3ba0da748f68a834c7f71e": "qwen3",
    "910b99b244299a7030f705939bb6894dc2f04f3051c12de9f068b4056ae5ba1f": "deepseek-v3.1",
}


def choose_format(directory: Path, library: tokenizers.Tokenizer, stops: Iterable[int],
                  wanted: str | None) -> tuple[Format | None, list[str]]:
    """(The chat format or None for plain text, notes). `wanted`: None to guess, "plain", "template" or a format's name.

    "template" takes what the template says even of a checkpoint that looks like a Base. Raises ValueError where
    `wanted` cannot be used.
    """
    directory = directory if directory.name else directory.resolve()  # the notes name it
    vocabulary = {token.content: id for id, token in library.get_added_tokens_decoder().items()}
    if wanted == "plain":
        return None, []
    name = directory.name
    template, notes = find_template(directory)
    format, exact = read_format(template) if template else (None, False)
    if wanted not in (None, "template"):
        fitting = [name for name, known in FORMATS.items() if not missing(known, vocabulary)]
        format = format if format and format.name == wanted else named(wanted, fitting)
        if lacking := missing(format, vocabulary):
            raise ValueError(f"{name} cannot be asked as {wanted}: its vocabulary has no {lacking}")
        return format, []
    if template and format is None:
        notes.append(f"the chat template of {name} is none that is known here")
    if format and (lacking := missing(format, vocabulary)):
        notes.append(f"the chat template of {name} needs {lacking}, which its vocabulary does not have")
        format = None
    if format is None and wanted == "template":
        unknown = f"{directory.name} has no chat template that is known here"
        nearest = [FORMATS[NEAREST[family]] for family in ("deepseek", "kimi", "glm", "chatml")]
        format = next((known for known in nearest if not missing(known, vocabulary)), None)
        if format is None:
            raise ValueError(f"{unknown}, and its vocabulary fits no known chat format")
        return format, [*notes, f"{unknown}: by its vocabulary it is asked as {format.name}"]
    if format is None:
        return None, [note + ": text is continued as it is; --chat-format NAME sets a format" for note in notes[-1:]]
    end, stops = MARKERS[format.family][0], tuple(stops)
    if wanted is None and stops and vocabulary[end] not in stops:
        stop = next((content for content, id in vocabulary.items() if id == stops[0]), stops[0])
        return None, [f"{directory.name} stops at {stop} as a Base checkpoint does, so its chat template is not used; "
                      "--chat, --system, --thinking or --chat-format NAME use it"]
    if not exact:
        notes.append(f"only the opening of the chat template of {directory.name} was recognised: it is asked as "
                     f"{format.name}, and its prompts may differ from the template's")
    return format, notes


def missing(format: Format, vocabulary: Mapping[str, int]) -> str | None:
    """The first token that the format's turns need and the vocabulary does not have."""
    return next((marker for marker in MARKERS[format.family] if marker not in vocabulary), None)


def find_template(directory: Path) -> tuple[str | None, list[str]]:
    """(The text of the checkpoint's chat template or None, a note why there is none)."""
    name = directory.name
    for path in (directory / "chat_template.jinja", directory / "additional_chat_templates/default.jinja"):
        if path.is_file():
            try:
                text = path.read_bytes().decode("utf-8-sig")
            except (OSError, UnicodeDecodeError):
                return None, [f"{path.name} of {name} is not readable text"]
            return (text, []) if text.strip() else (None, [f"{path.name} of {name} is empty"])
    template = None
    for path in (directory / "tokenizer_config.json", directory / "chat_template.json"):
        if template is None and path.is_file():
            values = read_json(path)
            template = values.get("chat_template") if isinstance(values, dict) else None
    if isinstance(template, list):  # several, each with a name
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)
                    and isinstance(entry.get("name"), str)}
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values())) if len(template) == 1 else "")
    if template is None:
        return None, [f"{name} has no chat template"]
    if not isinstance(template, str) or not template.strip():
        return None, [f"the chat_template of {name} is not text"]
    return template, []


def read_format(template: str) -> tuple[Format | None, bool]:
    """(The format of a template or None, whether all of it was recognised and not only its opening)."""
    if name := BY_HASH.get(hashlib.sha256(" ".join(template.split()).encode("utf-8", "surrogatepass")).hexdigest()):
        return FORMATS[name], True
    try:
        format = recognise(*read_template(template))
    except NotUnderstood:
        format = None
    exact = format is not None
    format = format or opens_like(template)
    if format and format.name == "chatml" and format.system is None and "<tool_response>" in template:
        format = replace(format, name="qwen3-instruct")  # the same prompts; Qwen's templates can do tools as well
    return format, exact


def opens_like(template: str) -> Format | None:
    """The known format nearest to a template that was not recognised as a whole."""
    text = re.sub(r"\{#.*?#\}", "", template.replace('"', "'"), flags=re.S).replace("\\n", "\n")
    opening = text.rpartition("add_generation_prompt")[2]  # what is written where the answer begins
    switch = re.search(r"\b(enable_)?thinking\b", opening)
    closed = END_THINK in opening
    if "[gMASK]" in text and "<|user|>" in text:
        return FORMATS["glm-4.5" if "/nothink" in text else "glm-4.7"]
    if IM_MIDDLE in text and "<|im_user|>" in text:
        default = re.search(r"<\|im_system\|>system<\|im_middle\|>([^<>{}']+)<\|im_end\|>", text)
        base = FORMATS["kimi-k2-thinking" if "<think></think>" in text else "moonlight"]
        return replace(base, system=default[1] if default else None)
    if USER in text and ASSISTANT in text:
        if switch:
            return FORMATS["deepseek-v3.1"]
        strips = END_THINK in text
        if re.search(rf"'{USER}' ?\+ ?\S+ ?\+ ?'{ASSISTANT}'", text):
            return FORMATS["deepseek-r1-0528" if strips else "deepseek-v3-0324"]
        return FORMATS["deepseek-r1" if THINK in opening else "deepseek-r1-first" if strips else "deepseek-v3"]
    if IM_START not in text:
        return None
    off, on = "<think>\n\n</think>\n\n", "<think>\n"
    opens = ("", off) if switch and closed else (on, "") if switch and THINK in opening else (off, off) if closed else (
        (on, on) if THINK in opening else ("", ""))
    history = "whole"
    if END_THINK in text.rpartition("add_generation_prompt")[0]:
        plain = re.search(r"message(\.|\[')role('\])? ?\+ ?'\n' ?\+ ?content", text)
        history = ("answer" if "reasoning_content" not in text else "kept" if not plain else
                   "last question" if "last_query_index" in text else "kept, if any")
    thinking = thinks(*opens)
    name = {"switch": "qwen3", "always": "qwen3-thinking"}.get(thinking, "qwen3-nonthinking" if closed else "chatml")
    return Format(name, "chatml", thinking, opens, default_system(template), history=history)


def default_system(template: str) -> str | None:
    """A default system prompt that is spelled in a template: in its turn, or as the value of a variable."""
    text = template.replace("\\n", "\n")
    if found := re.search(r"<\|im_start\|>system\n((?:(?!<\|im_end\|>|['\"]\s*[+}]|\{\{).)+)<\|im_end\|>", text, re.S):
        return found[1]
    for found in re.finditer(rf"set \w*system\w*(?:\.content)?\s*=\s*((?:{STRING}|[\s+\w])+?)-?%\}}", text, re.S):
        before = text[:found.start()].rpartition("if tools")
        # Variables between the strings, such as the date, are empty where nobody sets them.
        pieces = re.findall(STRING, found[1], re.S)
        value = "".join(re.sub(r"\\(.)", r"\1", piece[1:-1]) for piece in pieces)
        if value and (not before[1] or "else" in before[2]):
            return value
    return None
