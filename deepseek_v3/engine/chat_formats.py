"""The chat formats of other releases and of fine-tunes: each as data, and the code that writes a conversation in it.

The lesson (tokenizer.py) writes out the format of its own family. Here it is once more, among the others, and a test
holds the two equal.

    ChatML            <|im_start|>user\\nquestion<|im_end|>\\n<|im_start|>assistant\\n      Qwen, most fine-tunes of it
    DeepSeek          <｜begin▁of▁sentence｜><｜User｜>question<｜Assistant｜>               V3, R1, V3.1, distilled ones
    Moonlight, Kimi   <|im_user|>user<|im_middle|>question<|im_end|><|im_assistant|>assistant<|im_middle|>
    GLM               [gMASK]<sop><|user|>question<|assistant|>                            GLM-4.5, GLM-4.7

Within a family, formats differ in a few things, which are the fields of Format. A conversation becomes a list of texts
and special tokens (class Special): text of a message never becomes a special token, however it is spelled.
"""

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

# The names of special tokens are text here. Only Special(name), which a chat format writes, becomes the token.
IM_START, IM_END, IM_MIDDLE, THINK, END_THINK = "<|im_start|>", "<|im_end|>", "<|im_middle|>", "<think>", "</think>"
# Full-width bars (U+FF5C) and low blocks (U+2581): no keyboard types them, and they are spelled here only.
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
GLM_START, GLM_ROLES = ("[gMASK]", "<sop>"), {role: f"<|{role}|>" for role in ("system", "user", "assistant")}

# What a vocabulary must have for a family's turns; the token that ends an answer comes first.
MARKERS = {"chatml": (IM_END, IM_START), "deepseek": (EOS, USER, ASSISTANT),
           "kimi": (IM_END, "<|im_user|>", "<|im_assistant|>", "<|im_system|>", IM_MIDDLE),
           "glm": (GLM_ROLES["user"], GLM_ROLES["assistant"], GLM_ROLES["system"], *GLM_START)}
FIRST = ((BOS,), GLM_START)  # what stands before any text, where a vocabulary has it
SPELLED = sorted({*sum(MARKERS.values(), ()), BOS, THINK, END_THINK, "/nothink"}, key=len, reverse=True)

# Added tokens of the published tokenizers that a text never becomes, though most are not marked as special there.
BARRED = """
    object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end vision_pad image_pad
    video_pad fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep start_header_id end_header_id eot_id
    tool_calls_section_begin tool_calls_section_end tool_call_begin tool_call_argument_begin tool_call_end media_start
    media_content media_end media_pad begin_of_image end_of_image begin_of_video end_of_video begin_of_audio
    end_of_audio begin_of_transcription end_of_transcription image audio video code_prefix code_middle code_suffix
    begin_of_box end_of_box endoftext EOT observation""".split()
BRACKETED = ["[BOS]", "[EOS]", "[UNK]", "[PAD]", "[MASK]", "[sMASK]", "<eop>"]
TAGGED = "tool_call tool_response tools arg_key arg_value".split()
FULL_WIDTH = [" pad ", "fim hole", "fim begin", "fim end", "search begin", "search end", "tool calls begin",
              "tool calls end", "tool call begin", "tool call end", "tool outputs begin", "tool outputs end",
              "tool output begin", "tool output end", "tool sep"]
PUBLISHED = frozenset([
    *SPELLED, *BRACKETED, *(f"<|{name}|>" for name in BARRED), *(f"<{tag}>" for tag in TAGGED),
    *(f"</{tag}>" for tag in TAGGED), *(f"<\uff5c{name}\uff5c>".replace(" ", "\u2581") for name in FULL_WIDTH)])
NUMBERED = re.compile("<\uff5cplace\u2581holder\u2581no\u2581\\d+\uff5c>|<\\|reserved_\\w*\\d+\\|>")


class Special(str):
    """The name of a special token, as opposed to text that is spelled alike."""


@dataclass(frozen=True)
class Format:
    """One chat format. `opening`: what the prompt writes after the answer's header, with thinking and without."""

    name: str | None
    family: str
    thinking: str | None  # "switch", "always", "never"
    opening: tuple[str, str] = ("", "")
    system: str | None = None  # what stands in place of a system prompt where the conversation has none
    late_system: bool = True  # a system message that is not the first is a turn like others
    history: str = "whole"  # what becomes of an earlier answer, see `remembered`
    trim: bool = False  # white space around every content is cut
    # DeepSeek's only:
    systems: str = "joined"  # several system messages are "joined", or the "last" one counts
    header: str = "answer"  # what writes the answer's header: each "answer" or "question", an answer "after question"
    opens: str = "always"  # the prompt ends with the header "always", "when asked", "unless asked" (question did it)
    closed: bool = False  # </think> before each earlier answer


PLAIN = Format(None, "", None)  # no chat format: text is continued as it is


def known(*formats: Format) -> dict[str, Format]:
    return {format.name: format for format in formats}


OFF = "<think>\n\n</think>\n\n"
FORMATS = known(
    Format("qwen3", "chatml", "switch", ("", OFF), history="last question"),
    Format("qwen3-thinking", "chatml", "always", ("<think>\n", "<think>\n"), history="last question"),
    Format("qwen3-instruct", "chatml", "never"),
    Format("qwen3-nonthinking", "chatml", "never", (OFF, OFF), history="last question"),
    Format("qwen2.5", "chatml", "never", system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    Format("chatml", "chatml", "never"),
    Format("deepseek-v3", "deepseek", "never"),
    Format("deepseek-r1-first", "deepseek", "always", history="after thought"),
    Format("deepseek-r1", "deepseek", "always", ("<think>\n", "<think>\n"), history="after thought"),
    Format("deepseek-v3-0324", "deepseek", "never", header="question", opens="unless asked"),
    Format("deepseek-r1-0528", "deepseek", "always", header="question", opens="unless asked", history="after thought"),
    Format("deepseek-v3.1", "deepseek", "switch", ("<think>", "</think>"), header="after question", opens="when asked",
           history="after first thought", closed=True),
    Format("moonlight", "kimi", "never", system="You are a helpful assistant provided by Moonshot-AI."),
    Format("kimi-k2", "kimi", "never", system="You are a helpful assistant"),
    Format("kimi-k2-thinking", "kimi", "always", closed=True,
           system="You are Kimi, an AI assistant created by Moonshot AI."),
    Format("glm-4.5", "glm", "switch", ("", "\n<think></think>")),
    Format("glm-4.7", "glm", "switch", ("<think>", "</think>"), history="untrimmed"))
# Which format to take where only the vocabulary is known.
NEAREST = {"chatml": "chatml", "deepseek": "deepseek-v3", "kimi": "kimi-k2", "glm": "glm-4.7"}


def find_format(format: Format | str | None) -> Format:
    """A format, or the one of that name; None stands for plain text."""
    return PLAIN if format is None else named(format) if isinstance(format, str) else format


def find_ends(format: Format, special: dict[str, int]) -> tuple[int | None, list[int]]:
    """(The id that ends an answer or None, the ids that stand before any text), of the vocabulary's special tokens."""
    ends = [MARKERS[format.family][0]] if format.family else [IM_END, EOS]
    first = next((names for names in FIRST if set(names) <= set(special)), ())
    return next((special[name] for name in ends if name in special), None), [special[name] for name in first]


def named(name: str, names: Iterable[str] = FORMATS) -> Format:
    """The format of that name; ValueError lists `names`, those that can be chosen."""
    if name not in FORMATS:
        raise ValueError(f"chat format {name[:16]!r} is not known; choose {', '.join(('plain', 'template', *names))}")
    return FORMATS[name]


def literal(text: str) -> list[str]:
    """Text of a format itself, in which special tokens are meant."""
    parts = re.split("(" + "|".join(map(re.escape, SPELLED)) + ")", text)
    return [Special(part) if i % 2 else part for i, part in enumerate(parts) if part]


def render(format: Format, messages: list[dict[str, str]], thinking: bool,
           special: Container[str] | None = None) -> list[str]:
    """A conversation as texts and special tokens in turn, up to and with the beginning of the answer.

    DeepSeek's first token is left out where `special`, the vocabulary's special tokens, has none: a model with such a
    vocabulary was trained without it.
    """
    if not format.family:
        raise ValueError("this is taken for a Base checkpoint, which continues plain text; from_checkpoint(folder, "
                         'chat_format="template") follows its chat template, and a name of a format forces that one')
    check_messages(messages)
    if format.trim:
        messages = [message | {"content": message["content"].strip()} for message in messages]
    write = {"chatml": chatml, "deepseek": deepseek, "kimi": kimi, "glm": glm}[format.family]
    parts = write(format, messages, format.opening[0 if thinking else 1])
    without_bos = special is not None and BOS not in special
    return [part for part in parts if not (without_bos and isinstance(part, Special) and part == BOS)]


def check_messages(messages: list[dict[str, str]]) -> None:
    """ValueError for a message that cannot be written down."""
    for message in messages:
        role = message.get("role")
        if role not in ("system", "user", "assistant") or message.get("tool_calls") is not None:
            raise ValueError(f"a message has role {str(role)[:40]!r}; known are system, user and assistant, "
                             "without tool calls")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"the content of a message of role {role!r} is not text")


def split_reasoning(message: dict[str, str]) -> tuple[str, str]:
    """(reasoning, answer) of an assistant's message, with the published template's trimming of newlines."""
    content, reasoning = message["content"], message.get("reasoning_content")
    if isinstance(reasoning, str):
        return reasoning, content
    if END_THINK not in content:
        return "", content
    before, after = content.split(END_THINK)[0], content.split(END_THINK)[-1]
    return before.rstrip("\n").split(THINK)[-1].lstrip("\n"), after.lstrip("\n")


def with_default_system(format: Format, messages: list[dict[str, str]]) -> list[tuple[dict[str, str], list[str]]]:
    """(message, its content as parts) of each, a default system prompt first where it is needed."""
    turns = [(message, [message["content"]]) for i, message in enumerate(messages)
             if message["role"] != "system" or i == 0 or format.late_system]
    if format.system is not None and (not messages or messages[0]["role"] != "system"):
        turns.insert(0, ({"role": "system", "content": format.system}, literal(format.system)))
    return turns


def remembered(format: Format, message: dict[str, str], asked_later: bool, last: bool) -> list[str]:
    """An answer of the history. Reasoning is mostly left out: it was needed once, and would fill the context.

    "whole"                   as it is
    "answer"                  what follows </think>, without newlines before it
    "answer, last whole"      the same, except the conversation's last message
    "answer, if thought"      the same, but with its newlines where it has no </think>
    "after thought"           what follows </think>, always with its newlines; "after first thought": the first </think>
    "last question"           reasoning stays after the last question, and the very last message has it even if empty
    "last question, if any"   the same, except where it is empty
    "kept"                    reasoning always stays, even if empty; "kept, if any": except where it is empty
    """
    history = format.history
    if history == "whole" or (history == "answer, last whole" and last):
        return [message["content"]]
    if history.startswith(("answer", "after")):
        content = message["content"].split(END_THINK)[-1]
        kept = history.startswith("after") or (history.endswith("if thought") and END_THINK not in message["content"])
        return [content if kept else content.lstrip("\n")]
    reasoning, content = split_reasoning(message)
    shown = {"last question": not asked_later and (bool(reasoning) or last), "kept": True,
             "last question, if any": not asked_later and bool(reasoning), "kept, if any": bool(reasoning)}[history]
    if not shown:
        return [content]
    return [Special(THINK), "\n" + reasoning.strip("\n") + "\n", Special(END_THINK), "\n\n", content.lstrip("\n")]


def last_question(messages: list[dict[str, str]]) -> int:
    """Its index; a tool's result in a user's turn is not a question. Without any question: the last index."""
    questions = [i for i, message in enumerate(messages) if message["role"] == "user" and not (
        message["content"].startswith("<tool_response>") and message["content"].endswith("</tool_response>"))]
    return questions[-1] if questions else len(messages) - 1


def chatml(format: Format, messages: list[dict[str, str]], opening: str) -> list[str]:
    parts: list[str] = []
    turns = with_default_system(format, messages)
    asked = last_question([message for message, _ in turns])
    for i, (message, content) in enumerate(turns):
        if message["role"] == "assistant":
            content = remembered(format, message, i <= asked, i == len(turns) - 1)
        parts += [Special(IM_START), message["role"] + "\n", *content, Special(IM_END), "\n"]
    return [*parts, Special(IM_START), "assistant\n", *literal(opening)]


def deepseek(format: Format, messages: list[dict[str, str]], opening: str) -> list[str]:
    """DeepSeek's family: texts and Special tokens of a conversation, up to the header of the answer."""
    systems = [message["content"] for message in messages if message["role"] == "system"]
    if format.systems == "last":
        systems = systems[-1:]
    parts, asked = [Special(BOS), "\n\n".join(systems)], False
    header = [Special(ASSISTANT)]
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            by_question = ("question",) if i == len(messages) - 1 else ("question", "question, not the last")
            parts += [Special(USER), content, *(header if format.header in by_question else [])]
            asked = True
        elif message["role"] == "assistant":
            if format.history.startswith("after"):
                content = content.split(END_THINK, 1 if "first" in format.history else -1)[-1]
            if format.header == "answer" or (format.header == "after question" and asked):
                parts += header + ([Special(END_THINK)] if format.closed else [])
            parts += [content, Special(EOS)]
            asked = False
    if format.opens == "always" or asked == (format.opens == "when asked"):
        parts += header + literal(opening)
    return parts


def kimi(format: Format, messages: list[dict[str, str]], opening: str) -> list[str]:
    parts: list[str] = []
    for message, content in with_default_system(format, messages):
        role = message["role"]
        thought = [Special(THINK), Special(END_THINK)] if format.closed and role == "assistant" else []
        parts += [Special(f"<|im_{role}|>"), role, Special(IM_MIDDLE), *thought, *content, Special(IM_END)]
    return [*parts, Special("<|im_assistant|>"), "assistant", Special(IM_MIDDLE), *literal(opening)]


def glm(format: Format, messages: list[dict[str, str]], opening: str) -> list[str]:
    """GLM's family: the same. Only answers after the last question keep their reasoning."""
    parts: list[str] = [Special(name) for name in GLM_START]
    older = format.name == "glm-4.5"  # newlines after the roles, and /nothink after each question
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        parts.append(Special(GLM_ROLES[role]))
        if role != "assistant":
            quiet = older and role == "user" and END_THINK in opening and not content.endswith("/nothink")
            parts += ["\n" * older + content, *literal("/nothink" * quiet)]
            continue
        reasoning, answer = split_reasoning(message)
        if format.history == "untrimmed" and not isinstance(message.get("reasoning_content"), str):
            # newlines alone count as reasoning
            reasoning = content.split(END_THINK)[0].split(THINK)[-1] if END_THINK in content else ""
        thought = [Special(THINK), reasoning.strip(), Special(END_THINK)] if i > asked and reasoning else literal(
            "<think></think>" if older else END_THINK)
        parts += ["\n" * older, *thought, ("\n" * older + answer.strip()) if answer.strip() else ""]
    return [*parts, Special(GLM_ROLES["assistant"]), *literal(opening)]
