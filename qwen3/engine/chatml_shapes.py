"""ChatML's templates: what template_reader.py left of one -> its Format. The other families are in template_shapes.py.

Regular expressions over whole statements: how a system prompt and its default are written, which roles have turns, what
becomes of reasoning in the history, how the answer opens. A statement that is not accounted for is not recognised.
"""

import ast
import re
from dataclasses import replace

from .chat_formats import END_THINK, FORMATS, THINK, Format
from .template_expressions import STRING

ASKED = ("  if (ns.multi_step_tool and message.role == 'user' and not ({} and {}))\n"
         "    set ns.multi_step_tool = false\n    set ns.last_query_index = index\n")
INDEX = "  set index = messages._length - 1 - loop.index0\n"
# Where the last question stands, a tool's result not counted; the second is Unsloth's way for llama.cpp.
LAST_QUESTION = re.escape("""set ns = namespace(multi_step_tool=true, last_query_index=messages._length - 1)
for message in messages""") + "(?:" + re.escape("[::-1]\n" + INDEX + ASKED.format(
    "content.startswith('<tool_response>')", "content.endswith('</tool_response>')")) + "|" + re.escape(
        "\n" + INDEX + """  set message = messages[index]
  set current_content = content if content is not none else ''
  set tool_start = '<tool_response>'
  set tool_start_length = tool_start._length
  set start_of_message = current_content[:tool_start_length]
  set tool_end = '</tool_response>'
  set tool_end_length = tool_end._length
  set start_pos = current_content._length - tool_end_length
  if start_pos < 0
    set start_pos = 0
  set end_of_message = current_content[start_pos:]
""" + ASKED.format("start_of_message == tool_start", "end_of_message == tool_end")) + ")"

# A turn; an answer; the same with reasoning written before it.
TURN = (r"'<\|im_start\|>(?:' \+ message\.role \+ '|(?P<literal>user|assistant|system))\\n' \+ "
        r"content(?P<trim>\._trim)? \+ '<\|im_end\|>\\n'")
ROLE = r"'<\|im_start\|>(?:' \+ message\.role \+ '|assistant)\\n"
TURN_ = rf"{ROLE}' \+ content \+ '<\|im_end\|>\\n'"
PLAIN = rf"{ROLE}' \+ content"
THOUGHT = rf"{ROLE}<think>\\n' \+ reasoning_content\.strip\('\\n'\) \+ '\\n</think>\\n\\n' \+ content\.lstrip\('\\n'\)"
END = r"'<\|im_end\|>\\n'\n"
AFTER_THOUGHT = r"set content = content\.split\('</think>'\)\._last"
ANSWER = AFTER_THOUGHT + r"\.lstrip\('\\n'\)\n"
SPLIT = (
    r"(?:    set reasoning_content = ''\n)?"
    r"    if (?:message\.reasoning_content is string|"
    r"\(message\.reasoning_content is defined and message\.reasoning_content is not none\))\n"
    r"      set reasoning_content = message\.reasoning_content\n"
    r"    else\n"
    r"      if '</think>' in content\n"
    r"(?:{thought}(?:content|message\.content){cut}        {answer}|        {answer}{thought}message\.content{cut})"
).format(
    thought=r"        set reasoning_content = ", answer=ANSWER,
    cut=r"\.split\('</think>'\)\._first\.rstrip\('\\n'\)(?:\n        set reasoning_content = reasoning_content)?"
        r"\.split\('<think>'\)\._last\.lstrip\('\\n'\)\n")
AFTER_QUESTION = r"loop\.index0 > ns\.last_query_index"
ANSWERS = {
    "whole": rf"    out {TURN_}\n",
    "answer": rf"    {ANSWER}    out {TURN_}\n",
    "answer, last whole": rf"    if not loop\.last\n      {ANSWER}    out {TURN_}\n",
    "answer, if thought": rf"    if '</think>' in content\n      {ANSWER}    out {TURN_}\n",
    "after thought": rf"    if '</think>' in content\n      {AFTER_THOUGHT}\n    out {TURN_}\n",
    "last question": (
        rf"{SPLIT}"
        rf"    if {AFTER_QUESTION}\n"
        r"      if \(loop\.last or (?:\(not loop\.last and reasoning_content\)|reasoning_content)\)\n"
        rf"        out {THOUGHT}\n      else\n        out {PLAIN}\n"
        rf"    else\n      out {PLAIN}\n"
        rf"    out {END}"),
    "last question, if any": (
        rf"{SPLIT}"
        rf"(?:    if {AFTER_QUESTION}\n"
        rf"      if reasoning_content\n        out {THOUGHT}\n      else\n        out {PLAIN}\n"
        rf"    else\n      out {PLAIN}\n"
        rf"|    if \({AFTER_QUESTION} and reasoning_content\)\n      out {THOUGHT}\n    else\n      out {PLAIN}\n)"
        rf"    out {END}"),
    "kept": (
        rf"{SPLIT}"
        rf"(?:    out {THOUGHT} \+ {END}"
        rf"|    if {AFTER_QUESTION}\n      out {THOUGHT}\n    else\n      out {THOUGHT}\n    out {END})"),
    "kept, if any": (
        rf"{SPLIT}"
        rf"    if reasoning_content\n      out {THOUGHT}\n    else\n      out {PLAIN}\n"
        rf"    out {END}"),
}
# How a system prompt is written: (statements before the loop, whether the first system message is written by them).
FIRST = r"messages\[0\]\.role == 'system'"
GIVEN = r"  out '<\|im_start\|>system\\n' \+ messages\[0\]\.content(?:\._trim)? \+ '<\|im_end\|>\\n'\n"
CONTENT = r"messages\[0\]\.content(?:\._trim)?"
REST = r"  set loop_messages = messages\[1:\]\n"
ELSE = r"(?:else\n  set loop_messages = messages\n)?"
OPEN, SHUT = r"'<\|im_start\|>system\\n' \+ ", r" \+ '<\|im_end\|>\\n'\n"
SYSTEMS = [
    (rf"if {FIRST}\n{GIVEN}(?:else\n  out (?P<a>{STRING})\n)?", True),
    (rf"if messages\[0\]\.role != 'system'\n  out (?P<b>{STRING})\n(?:else\n{GIVEN}(?P<both>))?", False),
    (rf"set (?P<v>\w+) = (?P<c>{STRING})\nif {FIRST}\n  set (?P=v) = {CONTENT}\n(?:{REST}{ELSE})?"
     rf"(?:if (?P=v) is defined\n  )?out {OPEN}(?P=v){SHUT}", True),
    (rf"if {FIRST}\n  set (?P<w>\w+) = {CONTENT}\n(?:{REST})?else\n"
     rf"(?:  set loop_messages = messages\n)?  set (?P=w) = (?P<d>{STRING})\nout {OPEN}(?P=w){SHUT}", True),
    (rf"if {FIRST}\n  set (?P<x>\w+) = {CONTENT}\n{REST}{ELSE}"
     rf"if (?P=x) is defined\n  out {OPEN}(?P=x)(?:{SHUT}|\nif (?P=x) is defined\n  out '<\|im_end\|>\\n'\n)", True),
    ("", False),
]
IN_LOOP = rf"(?:  if \(loop\.first and (?:messages\[0\]|message)\.role != 'system'\)\n    out (?P<e>{STRING})\n)?"
ROLE_IS = r"message\.role == '(user|system|assistant)'(?P<late> and not loop\.first)?"
ROLES = re.compile(r"\(?(?:\(?message\.role == '(?:user|system|assistant)'(?: and not loop\.first\))?(?: or )?)+\)?")
LOOP = rf"for message in (?P<over>loop_messages|messages)\n{IN_LOOP}(?P<turns>(?:  .*\n)+)"
OPENING = (r"out '<\|im_start\|>assistant\\n(?P<open>(?:\\.|[^'\\])*)'\n"
           rf"(?:if (?P<test>(?:not )?(?:enable_)?thinking)\n  out (?P<then>{STRING})\n"
           rf"(?:else\n  out (?P<other>{STRING})\n)?)?")


def chatml(text: str) -> Format | None:
    """The Format of a template of the ChatML family; None where some part of it is not known."""
    asked = rf"(?:{LAST_QUESTION})?"
    for system, writes_first in SYSTEMS:
        found = re.fullmatch(rf"(?:set loop_messages = messages\n)?{asked}{system}{asked}{LOOP}{OPENING}", text)
        if found:
            break
    else:
        return None
    group = found.groupdict()
    turns = read_turns(group["turns"])
    if turns is None:
        return None
    roles, trims, history = turns
    systems = roles.get("system")  # "late": not the first; "all"; None: no turns of that role
    sets_both = all(f"set loop_messages = {which}\n" in text for which in ("messages[1:]", "messages"))
    if group["over"] == "loop_messages" and (systems == "late" or not sets_both):
        return None
    skips = group["over"] == "loop_messages" or systems != "all"
    if skips != (writes_first or group.get("both") is not None):
        return None  # a first system message would be written twice, or not at all
    if writes_first or group.get("both") is not None:
        trims |= {"messages[0].content._trim" in text}
    if len(trims) > 1 or (True in trims and history != "whole"):
        return None  # only some of the contents are trimmed
    if history.startswith("last question") and not ("ns.last_query_index = index" in text.partition(found["turns"])[0]):
        return None
    default = next((group[name] for name in "abcde" if group.get(name)), None)
    if default is not None:
        default = ast.literal_eval(default)
        if not (group.get("c") or group.get("d")):
            if not (default.startswith("<|im_start|>system\n") and default.endswith("<|im_end|>\n")):
                return None
            default = default.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    opened = ast.literal_eval(f"'{group['open']}'")
    on = off = opened
    if group["test"]:
        then, other = ast.literal_eval(group["then"]), ast.literal_eval(group["other"] or "''")
        on, off = (other, then) if group["test"].startswith("not") else (then, other)
        on, off = opened + on, opened + off
    return with_name(Format("", "chatml", thinks(on, off), (on, off), default, history=history, trim=True in trims,
                            late_system=systems is not None))


def read_turns(text: str) -> tuple[dict[str, str], set[bool], str] | None:
    """(Role -> which of its messages have turns, whether contents are trimmed, what becomes of earlier answers)."""
    arms = re.findall(r"  (?:if|elif) (.*)\n((?:    .*\n)+)|  else\n((?:    .*\n)+)|  (out .*\n)", text)
    roles: dict[str, str] = {}
    trims, history, whole = set(), "whole", ""
    for test, body, rest, only in arms:
        whole += f"  {only}" if only else f"  else\n{rest}" if rest else f"  {'elif' if roles else 'if'} {test}\n{body}"
        its = {role: "late" if late else "all" for role, late in re.findall(ROLE_IS, test)} if test else dict.fromkeys(
            ("user", "assistant", "system"), "all")
        its = {role: which for role, which in its.items() if roles.get(role) != "all"}
        turn = re.fullmatch(rf"(?:    )?out {TURN}\n", body or rest or only)
        answer = next((name for name, regex in ANSWERS.items() if re.fullmatch(regex, body)), None)
        if test and not ROLES.fullmatch(test):
            return None
        if turn and turn["literal"] in (None, *its) and (turn["literal"] is None or len(its) == 1):
            trims.add(bool(turn["trim"]))
        elif answer and list(its) == ["assistant"]:
            history = answer
        else:
            return None
        roles |= its
    if whole != text or roles.get("user") != "all" or roles.get("assistant") != "all":
        return None
    return roles, trims, history


def thinks(on: str, off: str) -> str:
    opens = THINK in on and END_THINK not in on
    return "switch" if on != off else "always" if opens else "never"


def with_name(format: Format) -> Format:
    """Named after the published format that it is, or is nearest to."""
    for name, known in FORMATS.items():
        if replace(known, name="") == replace(format, name="", system=known.system if format.system else format.system):
            if name != "qwen3-instruct" and (name != "qwen2.5" or format.system == known.system):
                return replace(format, name=name)
    if format.family == "chatml" and format.thinking == "never" and format.opening == ("", ""):
        return replace(format, name="chatml")
    alike = [known for known in FORMATS.values() if (known.family, known.thinking) == (format.family, format.thinking)]
    alike = alike or [known for known in FORMATS.values() if known.family == format.family]
    nearest = max(alike, key=lambda known: (known.opening == format.opening, known.header == format.header))
    return replace(format, name=nearest.name)
