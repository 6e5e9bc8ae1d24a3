"""The statements that a known chat format is made of: what template_reader.py left of a template -> its Format.

Regular expressions over whole statements: how a system prompt and its default are written, what becomes of reasoning
in the history, how the answer opens. A template is recognised only if every statement of it is accounted for.
"""

import ast
import re
from dataclasses import replace

from .chat_formats import ASSISTANT, BOS, END_THINK, EOS, FORMATS, THINK, USER, Format
from .template_reader import STRING

LAST_QUESTION = (r"for message in messages(\[::-1\])?\n(  .*\n)*?  if .*message\.role == 'user'.*\n"
                 r"(    .*\n)*?    set ns\.last_query_index = index\n")


# ChatML. A turn; the same with reasoning written before the answer; the beginning of either.
ROLE = r"(?:'<\|im_start\|>' \+ message\.role \+ '\\n|'<\|im_start\|>(?:user|assistant|system)\\n)"
TURN = rf"{ROLE}' \+ content(?P<trim>\._trim)? \+ '<\|im_end\|>\\n'"
TURN_ = rf"{ROLE}' \+ content(?:\._trim)? \+ '<\|im_end\|>\\n'"
PLAIN = rf"{ROLE}' \+ content"
THOUGHT = (rf"{ROLE}<think>\\n' \+ reasoning_content(?:\.strip\('\\n'\)|\._trim)? \+ '\\n</think>\\n\\n' \+ "
           r"content(?:\.lstrip\('\\n'\))?")
END = r"'<\|im_end\|>\\n'\n"
SPLIT = (r"    if .*message\.reasoning_content.*\n      set reasoning_content = message\.reasoning_content\n    else\n"
         r"      if '</think>' in content\n"
         r"(?:        set content = content\.split\('</think>'\)\._last\.lstrip\('\\n'\)\n"
         r"|        set reasoning_content = content\.split\('</think>'\)\._first\.rstrip\('\\n'\)(?:\n        set reasoning_content = reasoning_content)?"
         r"\.split\('<think>'\)\._last\.lstrip\('\\n'\)\n){2}")
ANSWERS = {
    "whole": rf"    out {TURN_}\n",
    "answer": rf"    set content = content\.split\('</think>'\)\._last\.lstrip\('\\n'\)\n    out {TURN_}\n",
    "answer, last whole": rf"    if not loop\.last\n      set content = content\.split\('</think>'\)\._last\.lstrip\('\\n'\)\n    out {TURN_}\n",
    "answer, if thought": rf"    if '</think>' in content\n      set content = content\.split\('</think>'\)\._last\.lstrip\('\\n'\)\n    out {TURN_}\n",
    "after thought": rf"    if '</think>' in content\n      set content = content\.split\('</think>'\)\._last\n    out {TURN_}\n",
    "last question": (rf"{SPLIT}    if loop\.index0 > ns\.last_query_index\n      if \(loop\.last or (?:\(not loop\.last and reasoning_content\)|"
                      rf"reasoning_content)\)\n        out {THOUGHT}\n      else\n        out {PLAIN}\n    else\n      out {PLAIN}\n    out {END}"),
    "last question, if any": (rf"{SPLIT}(?:    if loop\.index0 > ns\.last_query_index\n      if reasoning_content\n        out {THOUGHT}\n"
                              rf"      else\n        out {PLAIN}\n    else\n      out {PLAIN}\n|    if \(loop\.index0 > ns\.last_query_index and "
                              rf"reasoning_content\)\n      out {THOUGHT}\n    else\n      out {PLAIN}\n)    out {END}"),
    "kept": (rf"{SPLIT}(?:    out {THOUGHT} \+ {END}|    if loop\.index0 > ns\.last_query_index\n      out {THOUGHT}\n    else\n"
             rf"      out {THOUGHT}\n    out {END})"),
    "kept, if any": rf"{SPLIT}    if reasoning_content\n      out {THOUGHT}\n    else\n      out {PLAIN}\n    out {END}",
}
# How a system prompt is written: (statements before the loop, whether the first system message is written by them).
FIRST = r"messages\[0\]\.role == 'system'"
GIVEN = r"  out '<\|im_start\|>system\\n' \+ messages\[0\]\.content(?:\._trim)? \+ '<\|im_end\|>\\n'\n"
VALUE = r"'<\|im_start\|>system\\n' \+ (?P<{0}>\w+) \+ '<\|im_end\|>\\n'\n"
SYSTEMS = [
    (rf"if {FIRST}\n{GIVEN}(?:else\n  out (?P<a>{STRING})\n)?", True),
    (rf"if messages\[0\]\.role != 'system'\n  out (?P<b>{STRING})\n(?:else\n{GIVEN}(?P<both>))?", False),
    (rf"set (?P<v>\w+) = (?P<c>{STRING})\nif {FIRST}\n  set (?P=v) = messages\[0\]\.content(?:\._trim)?\n(?:  set loop_messages = messages\[1:\]\n)?"
     r"(?:if (?P=v)(?: is defined)?\n  )?out '<\|im_start\|>system\\n' \+ (?P=v) \+ '<\|im_end\|>\\n'\n", True),
    (rf"if {FIRST}\n  set (?P<w>\w+) = messages\[0\]\.content(?:\._trim)?\n(?:  set loop_messages = messages\[1:\]\n)?else\n  set (?P=w) = (?P<d>{STRING})\n"
     r"out '<\|im_start\|>system\\n' \+ (?P=w) \+ '<\|im_end\|>\\n'\n", True),
    (rf"if {FIRST}\n  set (?P<x>\w+) = messages\[0\]\.content(?:\._trim)?\n  set loop_messages = messages\[1:\]\n"
     r"if (?P=x) is defined\n  out '<\|im_start\|>system\\n' \+ (?P=x)(?: \+ '<\|im_end\|>\\n'\n|\nif (?P=x) is defined\n  out '<\|im_end\|>\\n'\n)", True),
    ("", False),
]
IN_LOOP = rf"(?:  if \(loop\.first and (?:messages\[0\]|message)\.role != 'system'\)\n    out (?P<e>{STRING})\n)?"
ROLES = r"\(?(?:(?:\(message\.role == 'system' and not loop\.first\)|message\.role == '(?:user|system|assistant)')(?: or )?)+\)?"
LOOP = (rf"for message in (?P<over>loop_messages|messages)\n{IN_LOOP}(?:  out {TURN}\n"
        rf"|  if (?P<roles>{ROLES})\n    out {TURN.replace('trim', 'trim2')}\n(?:  elif (?P<more>{ROLES})\n    out {TURN_}\n)*"
        rf"(?:  elif message\.role == 'assistant'\n(?P<answer>(?:    .*\n)+?))?(?:  elif (?P<late>{ROLES})\n    out {TURN_}\n)?(?P<rest>  else\n    out {TURN_}\n)?)")
OPENING = (rf"out '<\|im_start\|>assistant\\n(?P<open>(?:\\.|[^'\\])*)'\n"
           rf"(?:if (?P<test>(?:not )?(?:enable_)?thinking)\n  out (?P<then>{STRING})\n(?:else\n  out (?P<other>{STRING})\n)?)?")


def chatml(text: str) -> Format | None:
    for system, writes_first in SYSTEMS:
        found = re.fullmatch(rf"(?:{LAST_QUESTION})?{system}(?:{LAST_QUESTION})?{LOOP}{OPENING}", text)
        if found:
            break
    else:
        return None
    group = found.groupdict()
    roles = (group["roles"] or "") + (group["more"] or "") + (group["late"] or "")
    skips = group["over"] == "loop_messages" or "not loop.first" in roles or bool(roles and "system" not in roles and not group["rest"])
    if skips != (writes_first or group.get("both") is not None):
        return None  # a first system message would be written twice, or not at all
    trim = bool(group["trim"] or group.get("trim2"))
    if writes_first and trim != ("messages[0].content._trim" in text):
        return None  # only some of the contents are trimmed
    history = "whole"
    if group["answer"]:
        history = next((name for name, regex in ANSWERS.items() if re.fullmatch(regex, group["answer"])), None)
        if history is None or (history.startswith("last question") and "ns.last_query_index = index" not in text):
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
        on, off = (opened + other, opened + then) if group["test"].startswith("not") else (opened + then, opened + other)
    format = Format("", "chatml", thinks(on, off), (on, off), default, history=history, trim=trim,
                    late_system=not roles or "system" in roles or bool(group["rest"]))
    return with_name(format)


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
    return replace(format, name=max(alike, key=lambda known: (known.opening == format.opening, known.header == format.header)).name)


# DeepSeek.
JOINED = ("for message in messages\n  if message.role == 'system'\n    if ns.is_first_sp\n      set ns.system_prompt = ns.system_prompt + content\n"
          "    else\n      set ns.system_prompt = ns.system_prompt + '\\n\\n' + content\n")
LAST = "for message in messages\n  if message.role == 'system'\n    set ns.system_prompt = content\n"
ASKED = r"(?:{0}set ns\.is_last_user = {1}\n)?"
QUESTION = (rf"  if message\.role == 'user'\n{ASKED.format('    ', 'true')}"
            rf"(?:    out '{USER}' \+ content(?P<header> \+ '{ASSISTANT}')?\n"
            rf"|    if loop\.index0 == last_index\n      out '{USER}' \+ content\n    else\n      out '{USER}' \+ content \+ '{ASSISTANT}'\n(?P<but_last>))")
STRIP = (r"if '</think>' in content\n{0}  set content = content\.split\('</think>'(?P<one>, 1\)\[1\]|\)\._last)\n")
ANSWER = (rf"(?:  (?:el)?if message\.role == 'assistant'\n    {STRIP.format('    ')})?  (?:el)?if message\.role == 'assistant'\n"
          rf"(?P<asked>    if ns\.is_last_user\n      out '{ASSISTANT}(?P<closed></think>)?'\n)?{ASKED.format('    ', 'false')}"
          rf"(?:    {STRIP.format('    ').replace('one', 'one2')})?    out (?P<own>'{ASSISTANT}' \+ )?content \+ '{EOS}'\n")
OPENS = (rf"(?P<when>if (?:not )?ns\.is_last_user\n)?(?P<blank>  )?out '{ASSISTANT}(?P<open>(?:\\.|[^'\\])*)'\n"
         rf"(?:(?P=blank)?if (?P<test>(?:not )?(?:enable_)?thinking)\n *out (?P<then>{STRING})\n(?: *else\n *out (?P<other>{STRING})\n)?)?")


def deepseek(text: str) -> Format | None:
    bos = rf"out (?:bos_token|'{BOS}') \+ ns\.system_prompt\n"
    found = re.fullmatch(rf"(?P<systems>{re.escape(JOINED)}|{re.escape(LAST)}){bos}for message in messages\n{QUESTION}{ANSWER}{OPENS}", text)
    if not found:
        return None
    group = found.groupdict()
    header = ("question, not the last" if group["but_last"] is not None else "question" if group["header"] else
              "after question" if group["asked"] else "answer" if group["own"] else None)
    if header is None or (bool(group["own"]) != (header == "answer")):
        return None
    cut = group["one"] or group["one2"]
    on = off = ast.literal_eval(f"'{group['open']}'")
    if group["test"]:
        then, other = ast.literal_eval(group["then"]), ast.literal_eval(group["other"] or "''")
        on, off = (on + other, off + then) if group["test"].startswith("not") else (on + then, off + other)
    when = group["when"]
    thinking = thinks(on, off)
    format = Format("", "deepseek", "always" if thinking == "never" and cut else thinking, (on, off), header=header,
                    history="whole" if not cut else "after first thought" if cut.startswith(",") else "after thought",
                    systems="joined" if group["systems"] == JOINED else "last", closed=bool(group["closed"]),
                    opens="always" if not when else "unless asked" if "not " in when else "when asked")
    return with_name(format)


# Moonlight and Kimi: the marker of each role may be written apart from its name.
KIMI_TURNS = [
    "(?:" + "|".join(rf"  (?:el)?if message\.role == '{role}'\n    out '<\|im_{role}\|>{name.format(role=role)}'\n" for role in ("system", "user", "assistant"))
    + "){3}" + rest + r"content \+ '<\|im_end\|>'\n"
    for name, rest in ((r"{role}<\|im_middle\|>", "  out "), ("", r"  out message\.role \+ '<\|im_middle\|>' \+ "))]
KIMI_SYSTEM = r"if (?:\(loop\.first and )?(?:messages\[0\]|message)\.role != 'system'\)?\n{0}  out (?P<{1}>" + STRING + r")\n"
KIMI_OPENING = r"out '<\|im_assistant\|>assistant<\|im_middle\|>(?P<open>[^']*)'\n"
KIMI_THINKING = """for message in hist_msgs
  out set_roles(message)
  if message.role == 'assistant'
    out '<think></think>' + render_content(message)
  else
    out render_content(message)
  out '<|im_end|>'
for message in suffix_msgs
  out set_roles(message)
  if message.role == 'assistant'
    set rc = message.reasoning_content
    out '<think>' + rc + '</think>' + render_content(message)
  else
    out render_content(message)
  out '<|im_end|>'
"""
KIMI_SPLIT = """for idx in range(messages|length-1, -1, -1)
  if messages[idx].role == 'assistant'
    set ns.last_non_tool_call_assistant_msg = idx
    set break
set hist_msgs = messages[:ns.last_non_tool_call_assistant_msg + 1]
set suffix_msgs = messages[ns.last_non_tool_call_assistant_msg + 1:]
"""
KIMI_ROLES = ["set role_name = message.name or message.role",
              "if message.role == 'user'", "  out '<|im_user|>' + role_name + '<|im_middle|>'",
              "elif message.role == 'assistant'", "  out '<|im_assistant|>' + role_name + '<|im_middle|>'",
              "else", "  out '<|im_system|>' + role_name + '<|im_middle|>'"]


def kimi(text: str, macros: dict[str, list[str]]) -> Format | None:
    thinking = macros.get("set_roles") == KIMI_ROLES and macros.get("render_content", [])[:3] == ["set c = content", "if c is string", "  out c"]
    loops = [rf"for message in messages\n(?:  {KIMI_SYSTEM.format('  ', 'inner')})?{turns}" for turns in KIMI_TURNS]
    loops += [re.escape(KIMI_THINKING) + "(?P<thought>)"] if thinking else []
    for loop in loops:
        found = re.fullmatch(rf"(?:{re.escape(KIMI_SPLIT)})?(?:{KIMI_SYSTEM.format('', 'outer')})?{loop}{KIMI_OPENING}", text)
        if found:
            break
    else:
        return None
    group = found.groupdict()
    system = group.get("inner") or group["outer"]
    if system is not None:
        inside = re.fullmatch(r"<\|im_system\|>system<\|im_middle\|>(.*)<\|im_end\|>", ast.literal_eval(system), re.S)
        if not inside:
            return None
        system = inside[1]
    on = ast.literal_eval(f"'{group['open']}'")
    thought = "thought" in group
    format = Format("", "kimi", "always" if thought or thinks(on, on) == "always" else "never", (on, on), system, closed=thought)
    names = {FORMATS[name].system: name for name in ("moonlight", "kimi-k2", "kimi-k2-thinking")}
    return replace(format, name="kimi-k2-thinking" if thought else names.get(system, "moonlight"))


GLM_REASONING = """    if message.reasoning_content is string
      set reasoning_content = message.reasoning_content
    else
      if '</think>' in content
        set reasoning_content = content.split('</think>')._first{trims}
        set content = content.split('</think>')._last{trim}
"""
GLM = {
    "glm-4.5": """  if message.role == 'user'
    out '<|user|>\\n' + content
    if (not enable_thinking and not content.endswith('/nothink'))
      out '/nothink'
  elif message.role == 'assistant'
    out '<|assistant|>'
REASONING    if (loop.index0 > ns.last_user_index and reasoning_content)
      out '\\n<think>' + reasoning_content._trim + '</think>'
    else
      out '\\n<think></think>'
    if content._trim
      out '\\n' + content._trim
  elif message.role == 'system'
    out '<|system|>\\n' + content
out '<|assistant|>'
if not enable_thinking
  out '\\n<think></think>'
""",
    "glm-4.7": """  if message.role == 'user'
    out '<|user|>' + content
  elif message.role == 'assistant'
    out '<|assistant|>'
REASONING    if LATER
      out '<think>' + reasoning_content._trim + '</think>'
    else
      out '</think>'
    if content._trim
      out content._trim
  elif message.role == 'system'
    out '<|system|>' + content
out '<|assistant|>'
if not enable_thinking
  out '</think>'
else
  out '<think>'
"""}
GLM_LATER = r"\((?:\((?:clear_thinking is defined and )?not clear_thinking\)? or )?loop\.index0 > ns\.last_user_index\)? and reasoning_content\)"
GLM_START = """out '[gMASK]<sop>'
for message in messages
  if message.role == 'user'
    set ns.last_user_index = loop.index0
for message in messages
"""


def glm(text: str) -> Format | None:
    text = re.sub(r"^( +)set content = content\n", "", text, flags=re.M).replace("\\u200b", "")
    trims = [(r".rstrip('\n').split('<think>')._last.lstrip('\n')", r".lstrip('\n')"), (".split('<think>')._last", "")]
    for name, body in GLM.items():
        for first, second in trims:
            whole = re.escape(GLM_START + body.replace("REASONING", GLM_REASONING.format(trims=first, trim=second)))
            whole = whole.replace("LATER", rf"(?:{GLM_LATER}|\(\(\(clear_thinking is defined and not clear_thinking\) or loop\.index0 > "
                                  r"ns\.last_user_index\) and reasoning_content\))")
            if re.fullmatch(whole, text):
                return FORMATS[name]
    return None


def recognise(statements: list[str], macros: dict[str, list[str]]) -> Format | None:
    """The format that these statements are; None if one of them is not accounted for."""
    text = "".join(line + "\n" for line in statements)
    for name, body in macros.items():  # a macro that only writes a text is that text
        if body[:2] == ["if message is string", "  out message"]:
            text = text.replace(f"{name}(content)", "content")
    text = re.sub(r"^ *set content = content\n", "", text, flags=re.M)
    return chatml(text) or deepseek(text) or kimi(text, macros) or glm(text)
