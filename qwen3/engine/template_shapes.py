"""The statements that a known chat format is made of: what template_reader.py left of a template -> its Format.

Regular expressions over whole statements, for each family; ChatML's are in chatml_shapes.py. A template is
recognised only if every statement of it is accounted for.
"""

import ast
import re
from dataclasses import replace

from .chat_formats import ASSISTANT, BOS, EOS, FORMATS, USER, Format
from .chatml_shapes import chatml, thinks, with_name
from .template_expressions import STRING

# DeepSeek.
JOINED = """for message in messages
  if message.role == 'system'
    if ns.is_first_sp
      set ns.system_prompt = ns.system_prompt + content
      set ns.is_first_sp = false
    else
      set ns.system_prompt = ns.system_prompt + '\\n\\n' + content
"""
LAST = "for message in messages\n  if message.role == 'system'\n    set ns.system_prompt = content\n"
VARIABLES = "|".join([r"is_first=\w+", r"is_output_first=\w+", "is_tool=false", "system_prompt=''", "is_first_sp=true",
                      "is_last_user=false"])
BEGIN = rf"set ns = namespace\((?P<begin>(?:(?:{VARIABLES})(?:, |(?=\))))+)\)\n"
SYSTEM = rf"(?P<systems>{re.escape(JOINED)}|{re.escape(LAST)})out (?:bos_token|'{BOS}') \+ ns\.system_prompt\n"
ASKED = r"(?:{0}set ns\.is_last_user = {1}\n)?"
QUESTION = (
    rf"  if message\.role == 'user'\n{ASKED.format('    ', 'true')}"
    rf"(?:    out '{USER}' \+ content(?P<header> \+ '{ASSISTANT}')?\n"
    rf"|    if loop\.index0 == last_index\n      out '{USER}' \+ content\n"
    rf"    else\n      out '{USER}' \+ content \+ '{ASSISTANT}'\n(?P<not_the_last>))")
STRIP = r"if '</think>' in content\n{0}  set content = content\.split\('</think>'(?P<{1}>, 1\)\[1\]|\)\._last)\n"
ANSWER = (
    rf"(?:  (?:el)?if message\.role == 'assistant'\n    {STRIP.format('    ', 'one')})?"
    r"  (?:el)?if message\.role == 'assistant'\n"
    rf"(?P<asked>    if ns\.is_last_user\n      out '{ASSISTANT}(?P<closed></think>)?'\n)?"
    rf"{ASKED.format('    ', 'false')}"
    rf"(?:    {STRIP.format('    ', 'other_one')})?    out (?P<own>'{ASSISTANT}' \+ )?content \+ '{EOS}'\n")
OPENS = (
    rf"(?P<when>if (?:not )?ns\.is_last_user\n)?(?P<blank>  )?out '{ASSISTANT}(?P<open>(?:\\.|[^'\\])*)'\n"
    rf"(?:(?P=blank)?if (?P<test>(?:not )?(?:enable_)?thinking)\n *out (?P<then>{STRING})\n"
    rf"(?: *else\n *out (?P<other>{STRING})\n)?)?")


def deepseek(text: str) -> Format | None:
    """The Format of a template of DeepSeek's family; None where some part of it is not known."""
    found = re.fullmatch(rf"{BEGIN}{SYSTEM}for message in messages\n{QUESTION}{ANSWER}{OPENS}", text)
    if not found:
        return None
    group = found.groupdict()
    header = ("question, not the last" if group["not_the_last"] is not None else "question" if group["header"] else
              "after question" if group["asked"] else "answer" if group["own"] else None)
    if header is None or (bool(group["own"]) != (header == "answer")):
        return None
    joins = group["systems"] == JOINED
    if "system_prompt=''" not in group["begin"] or ("is_first_sp=true" not in group["begin"] and joins):
        return None
    sets_both = all(f"set ns.is_last_user = {value}\n" in text for value in ("true", "false"))
    if (group["when"] or group["asked"]) and not sets_both:
        return None
    cut = group["one"] or group["other_one"]
    on = off = ast.literal_eval(f"'{group['open']}'")
    if group["test"]:
        then, other = ast.literal_eval(group["then"]), ast.literal_eval(group["other"] or "''")
        on, off = (on + other, off + then) if group["test"].startswith("not") else (on + then, off + other)
    when = group["when"]
    thinking = thinks(on, off)
    format = Format("", "deepseek", "always" if thinking == "never" and cut else thinking, (on, off), header=header,
                    history="whole" if not cut else "after first thought" if cut.startswith(",") else "after thought",
                    systems="joined" if joins else "last", closed=bool(group["closed"]),
                    opens="always" if not when else "unless asked" if "not " in when else "when asked")
    return with_name(format)


# Moonlight and Kimi: the marker of each role may be written apart from its name.
KIMI_ROLE = r"  (?:el)?if message\.role == '{role}'\n    out '<\|im_{role}\|>{name}'\n"
KIMI_ROLES = ("system", "user", "assistant")
KIMI_TURNS = [
    "(?:" + "|".join(KIMI_ROLE.format(role=role, name=name.format(role=role)) for role in KIMI_ROLES)
    + "){3}" + rest + r"content \+ '<\|im_end\|>'\n"
    for name, rest in ((r"{role}<\|im_middle\|>", "  out "), ("", r"  out message\.role \+ '<\|im_middle\|>' \+ "))]
KIMI_SYSTEM = (r"if (?:\(loop\.first and )?(?:messages\[0\]|message)\.role != 'system'\)?\n"
               r"{0}  out (?P<{1}>" + STRING + r")\n")
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
KIMI_SPLIT = """set ns = namespace(last_non_tool_call_assistant_msg=-1)
for idx in range(messages|length-1, -1, -1)
  if messages[idx].role == 'assistant'
    set ns.last_non_tool_call_assistant_msg = idx
    set break
set hist_msgs = messages[:ns.last_non_tool_call_assistant_msg + 1]
set suffix_msgs = messages[ns.last_non_tool_call_assistant_msg + 1:]
"""
KIMI_SET_ROLES = [
    "set role_name = message.name or message.role",
    "if message.role == 'user'", "  out '<|im_user|>' + role_name + '<|im_middle|>'",
    "elif message.role == 'assistant'", "  out '<|im_assistant|>' + role_name + '<|im_middle|>'",
    "else", "  out '<|im_system|>' + role_name + '<|im_middle|>'"]


def kimi(text: str, macros: dict[str, list[str]]) -> Format | None:
    """The Format of a template of Kimi's family, Moonlight among them; None where some part of it is not known."""
    first, *rest = macros.get("render_content") or [""]
    thinking = macros.get("set_roles") == KIMI_SET_ROLES and first == "set c = content" and writes_text(rest, "c")
    loops = [rf"for message in messages\n(?:  {KIMI_SYSTEM.format('  ', 'inner')})?{turns}" for turns in KIMI_TURNS]
    loops += [re.escape(KIMI_THINKING) + "(?P<thought>)"] if thinking else []
    split = re.escape(KIMI_SPLIT) if "hist_msgs" in text else ""
    for loop in loops:
        found = re.fullmatch(rf"{split}(?:{KIMI_SYSTEM.format('', 'outer')})?{loop}{KIMI_OPENING}", text)
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
    names = {FORMATS[name].system: name for name in ("moonlight", "kimi-k2", "kimi-k2-thinking")}
    name = "kimi-k2-thinking" if thought else names.get(system, "moonlight")
    thinking = "always" if thought or thinks(on, on) == "always" else "never"
    return Format(name, "kimi", thinking, (on, on), system, closed=thought)


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
# Two published spellings of "the answer follows the last question, or thoughts are kept".
GLM_LATER = "(?:" + "|".join([
    r"\((?:\((?:clear_thinking is defined and )?not clear_thinking\)? or )?loop\.index0 > ns\.last_user_index\)? and "
    r"reasoning_content\)",
    r"\(\(\(clear_thinking is defined and not clear_thinking\) or loop\.index0 > ns\.last_user_index\) and "
    r"reasoning_content\)"]) + ")"
GLM_START = """out '[gMASK]<sop>'
set ns = namespace(last_user_index=-1)
for message in messages
  if message.role == 'user'
    set ns.last_user_index = loop.index0
for message in messages
"""


def glm(text: str) -> Format | None:
    opens = "    out '<|assistant|>'\n"
    text = text.replace(opens + "    set reasoning_content = ''\n", opens).replace("\\u200b", "")
    trims = [(r".rstrip('\n').split('<think>')._last.lstrip('\n')", r".lstrip('\n')"), (".split('<think>')._last", "")]
    for name, body in GLM.items():
        for first, second in trims:
            whole = re.escape(GLM_START + body.replace("REASONING", GLM_REASONING.format(trims=first, trim=second)))
            if re.fullmatch(whole.replace("LATER", GLM_LATER), text):
                return replace(FORMATS[name], history="whole" if first == trims[0][0] else "untrimmed")
    return None


def writes_text(body: list[str], name: str) -> bool:
    """Whether a macro only writes its argument where that is a text."""
    if body[:2] != [f"if {name} is string", f"  out {name}"]:
        return False
    others = body[2:]
    is_one_statement = all(line.startswith(("  ", "elif ", "else")) for line in others)
    return not others or (is_one_statement and not others[0].startswith(" "))


def recognise(statements: list[str], macros: dict[str, list[str]]) -> Format | None:
    """The format that these statements are; None if one of them is not accounted for."""
    text = "".join(line + "\n" for line in statements)
    for name, body in macros.items():  # a macro that only writes a text is that text
        if writes_text(body, "message"):
            text = text.replace(f"{name}(content)", "content")
    text = re.sub(r"^ *set content = content\n", "", text, flags=re.M)
    return chatml(text) or deepseek(text) or kimi(text, macros) or glm(text)
