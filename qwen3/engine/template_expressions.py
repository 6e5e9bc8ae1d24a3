"""The expressions of a Jinja template, read without running them: one spelling for one meaning, and which tests hold.

Python's parser reads an expression, once filters are written as fields:  content | trim  ->  content._trim
"""

import ast
import re

STRING = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\n": ""}

# Which tests hold, and which do not, in every conversation that is rendered here: texts by three roles, no tools, and
# an answer is to follow.
HOLDS = re.compile("|".join([
    r"tools (is|==) (none|undefined|not defined)",
    r".*tool_calls (is not none|is not defined|is undefined)", r"'tool_calls' not in .*",
    r"message\.role != '(tool|ipython|function|observation)'",
    r"(content|messages\[0\]\.content) is (string|not none|defined)",
    r"add_generation_prompt( is defined| is true)?", r"messages", r"message", r"message\.role is defined",
    r"(enable_)?thinking is defined", r"message\.content is (string|not none|defined)", r"\(?messages\._length > 0"]))
HOLDS_NOT = re.compile("|".join([
    r".*\b(tools|documents|custom_tools|builtin_tools|tool_calls|add_vision_id|date_string|prefix)\b.*",
    r"message\.role == '(tool|ipython|function|observation|developer)'", r"ns\.is_tool(_outputs)?",
    r"(content|message\.content|messages\[0\]\.content) is (none|not string|not defined|iterable|mapping)",
    r"(enable_)?thinking is (not defined|none|undefined)", r"add_generation_prompt is (not defined|undefined)",
    r"messages\._length == 0"]))
SPELLINGS = [(r"(\w+) (?:is|==) false", r"not \1"), (r"(\w+) (?:is|==) true", r"\1")]


class NotUnderstood(ValueError):
    """A statement that cannot be read here; the template may still be recognised by its opening."""


def parse(code: str, loop_name: str, content: str = "given") -> ast.expr:
    """An expression of Jinja as a tree: Python's parser reads it, once filters are written as fields.

    `content`: whether the variable of that name is the message's here ("given"), is unset, or has been "changed".
    """
    parts = re.split(f"({STRING})", code, flags=re.S)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = repr(re.sub(r"\\(.)", lambda match: ESCAPES.get(match[1], match[1]), part[1:-1], flags=re.S))
        else:
            parts[i] = re.sub(r"\|\s*(\w+)", r"._\1", " ".join(part.split())).replace("~", "+")
    source = " ".join(parts).strip()
    for attempt in (source, source + " else ''"):  # Jinja's `a if b` needs no else
        try:
            return Even(loop_name, content).visit(ast.parse(f"({attempt})", mode="eval").body)
        except (SyntaxError, ValueError, MemoryError):
            pass
    raise NotUnderstood(code)


class Even(ast.NodeTransformer):
    """One spelling for one meaning: message["content"] and message.content, [-1] and |last, "a" + "b" and "ab"."""

    def __init__(self, loop_name: str, content: str):
        self.loop_name, self.content = loop_name, content

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == "content" != self.loop_name and self.content == "unset":
            return ast.Name("unset")
        return ast.Name("message") if node.id == self.loop_name else node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """message.get(x) is None where x is not there, and message[x] is not."""
        if re.fullmatch(r"\w+\.get\('\w+'\) is (not )?none", ast.unparse(node)):
            node.comparators = [ast.Name("defined")]
            node.ops = [ast.IsNot() if isinstance(node.ops[0], ast.Is) else ast.Is()]
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        self.generic_visit(node)
        if is_text(node.slice) and node.slice.value.isidentifier():
            return self.visit_Attribute(ast.Attribute(node.value, node.slice.value))
        end = {"-1": "_last", "0": "_first"}.get(ast.unparse(node.slice))
        return ast.Attribute(node.value, end) if end and isinstance(node.value, ast.Call) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        return ast.Name("content") if ast.unparse(node) == "message.content" and self.content != "changed" else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if ast.unparse(node).startswith("message.get("):
            named = node.args and isinstance(node.args[0], ast.Constant) and str(node.args[0].value).isidentifier()
            return self.visit_Attribute(ast.Attribute(ast.Name("message"), node.args[0].value)) if named else node
        strips = isinstance(node.func, ast.Attribute) and node.func.attr == "strip" and not node.args
        return ast.Attribute(node.func.value, "_trim") if strips else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        return joined(terms(node)) if isinstance(node.op, ast.Add) else node


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def terms(node: ast.expr) -> list[ast.expr]:
    is_sum = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)
    return terms(node.left) + terms(node.right) if is_sum else [node]


def joined(parts: list[ast.expr]) -> ast.expr:
    """The sum of the parts, neighbouring texts made one."""
    out: list[ast.expr] = []
    for part in parts:
        if out and is_text(part) and is_text(out[-1]):
            out[-1] = ast.Constant(out[-1].value + part.value)
        else:
            out.append(part)
    total = out[0]
    for part in out[1:]:
        total = ast.BinOp(total, ast.Add(), part)
    return total


def condition(node: ast.expr) -> tuple[bool | None, str]:
    """(Whether it holds in every conversation, in none, or None: it depends; what is left of it then)."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value, rest = condition(node.operand)
        opposite = rest.removeprefix("not ") if rest.startswith("not ") else f"not {rest}"
        return (None if value is None else not value), opposite
    if isinstance(node, ast.BoolOp):
        decides = isinstance(node.op, ast.Or)
        found = [condition(value) for value in node.values]
        if any(value is decides for value, _ in found):
            return decides, ""
        left = [rest for value, rest in found if value is None]
        text = (" or " if decides else " and ").join(left)
        return (None, text if len(left) == 1 else f"({text})") if left else (not decides, "")
    text = ast.unparse(node)
    if HOLDS.fullmatch(text):
        return True, ""
    if HOLDS_NOT.fullmatch(text):
        return False, ""
    for pattern, spelling in SPELLINGS:
        text = re.sub(f"^{pattern}$", spelling, text)
    return None, text
