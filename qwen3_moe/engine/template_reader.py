"""A chat template, read without running it: its text -> the statements that a conversation without tools can reach.

A template is a program in Jinja. Here it is only read: cut into tags, each expression parsed and written in one
spelling, and the branches for tools, images and documents struck out. What is left, some twenty lines, can be
compared with what chat_formats.py renders (see templates.py). Nothing of a template is ever executed.

    {%- if tools %}…{%- else %}{%- if messages[0]["role"] == "system" %}…      ->     if messages[0].role == 'system'
"""

import ast
import re

STRING = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
BODY = rf"(?:{STRING}|[^'\"{{]|\{{(?![{{%#]))*?"
TAG = re.compile(rf"(?P<comment>\{{#.*?#\}})|\{{%(?P<open>[-+]?)(?P<tag>{BODY})(?P<shut>[-+]?)%\}}"
                 rf"|\{{\{{(?P<before>-?)(?P<out>{BODY})(?P<after>-?)\}}\}}", re.S)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\n": ""}
LONGEST = 40_000  # characters; published templates have up to 16,000

# What holds, and what does not, in every conversation that is rendered here: texts by three roles, no tools, an answer is to follow.
HOLDS, HOLDS_NOT = (re.compile("|".join(patterns)) for patterns in (
    [r"tools (is|==) (none|undefined|not defined)", r".*tool_calls (is not none|is not defined|is undefined)|'tool_calls' not in .*",
     r"message\.role != '(tool|ipython|function|observation)'", r"(content|messages\[0\]\.content) is (string|not none|defined)",
     r"add_generation_prompt( is defined| is true)?|messages|message|message\.role is defined", r"(enable_)?thinking is defined",
     r"message\.content is (string|not none|defined)", r"\(?messages\._length > 0"],
    [r".*\b(tools|documents|custom_tools|builtin_tools|tool_calls|add_vision_id|date_string|prefix)\b.*",
     r"message\.role == '(tool|ipython|function|observation|developer)'", r"ns\.is_tool(_outputs)?",
     r"(content|message\.content|messages\[0\]\.content) is (none|not string|not defined|iterable|mapping)",
     r"(enable_)?thinking is (not defined|none|undefined)|add_generation_prompt is (not defined|undefined)|messages\._length == 0"]))
SPELLINGS = [(r"(\w+) (?:is|==) false", r"not \1"), (r"(\w+) (?:is|==) true", r"\1")]
# Statements that change nothing in such a conversation.
IDLE = re.compile(r"content = content|ns\.(is_tool|is_first|is_output_first|is_tool_outputs) = false|tools = (none|None|\[\])|"
                  r"(image_count|video_count|tool_call_counter) = namespace\(value=0\)|tool_response_queue = namespace\(ids=\[\]\)|"
                  r"last_index = messages\._length - 1")


class NotUnderstood(ValueError):
    """A statement that cannot be read here; the template may still be recognised by its opening."""


def read_template(template: str) -> tuple[list[str], dict[str, list[str]]]:
    """(The statements, indented; those of each macro)."""
    if len(template) > LONGEST:
        raise NotUnderstood("too long")
    try:
        reader = Reader(template)
        return lines(reader.body(())), {name: lines(body) for name, body in reader.macros.items()}
    except RecursionError:
        raise NotUnderstood("nested too deeply") from None


def cut(template: str) -> list[tuple[str, str]]:
    """("text" | "out" | "tag", its text) in turn; white space is cut away as transformers sets Jinja up to do."""
    out, at, eat = [], 0, ""
    template = template.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")

    def text(piece: str, strip: bool, indented: bool) -> None:
        before, newline, blanks = piece.rpartition("\n")
        begins = not blanks.strip(" \t") and (newline or at == 0)  # the tag that follows begins its line
        if strip:
            piece = piece.rstrip()
        elif indented and begins:
            piece = before + newline
        piece = piece.lstrip() if eat == "all" else piece.removeprefix("\n") if eat == "newline" else piece
        if piece:
            out.append(("text", piece))

    for match in TAG.finditer(template):
        comment, tag = match["comment"], match["tag"]
        strip = comment.startswith("{#-") if comment else "-" in (match["open"], match["before"])
        text(template[at:match.start()], strip, match["out"] is None and match["open"] != "+")
        if not comment:
            out.append(("out", match["out"].strip()) if tag is None else ("tag", tag.strip()))
        all = comment.endswith("-#}") if comment else "-" in (match["shut"], match["after"])
        eat = "all" if all else "" if match["out"] is not None else "newline"
        at = match.end()
    text(template[at:], False, False)
    return out


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
    """One spelling for what means the same: message["content"] and message.content, [-1] and |last, "a" + "b" and "ab"."""

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
        if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str) and node.slice.value.isidentifier():
            return self.visit_Attribute(ast.Attribute(node.value, node.slice.value))
        text = ast.unparse(node.slice)
        return ast.Attribute(node.value, {"-1": "_last", "0": "_first"}[text]) if text in ("-1", "0") and isinstance(
            node.value, ast.Call) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        return ast.Name("content") if ast.unparse(node) == "message.content" and self.content != "changed" else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        text = ast.unparse(node)
        if text.startswith("message.get("):
            return self.visit_Attribute(ast.Attribute(ast.Name("message"), ast.literal_eval(node.args[0]))) if node.args and isinstance(
                node.args[0], ast.Constant) and str(node.args[0].value).isidentifier() else node
        return ast.Attribute(node.func.value, "_trim") if isinstance(node.func, ast.Attribute) and node.func.attr == "strip" and not (
            node.args) else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        return joined(terms(node)) if isinstance(node.op, ast.Add) else node


def terms(node: ast.expr) -> list[ast.expr]:
    return terms(node.left) + terms(node.right) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else [node]


def joined(parts: list[ast.expr]) -> ast.expr:
    """The sum of the parts, neighbouring texts made one."""
    out: list[ast.expr] = []
    for part in parts:
        if out and all(isinstance(node, ast.Constant) and isinstance(node.value, str) for node in (part, out[-1])):
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
        return (None if value is None else not value), rest.removeprefix("not ") if rest.startswith("not ") else f"not {rest}"
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


class Reader:
    """Tags in turn -> a tree of ("out", expression), ("set", text), ("if", arms), ("for", what, body)."""

    def __init__(self, template: str):
        self.queue, self.at, self.loop_name, self.macros = cut(template), 0, "message", {}
        self.content = "unset"  # what the variable `content` is at this place

    def parse(self, code: str) -> ast.expr:
        return parse(code, self.loop_name, self.content)

    def body(self, until: tuple[str, ...]) -> list[tuple]:
        out: list[tuple] = []
        while self.at < len(self.queue):
            kind, text = self.queue[self.at]
            word = re.match(r"\w*", text)[0] if kind == "tag" else kind
            if word in until:
                return out
            self.at += 1
            rest = text[len(word):].strip()
            if kind == "text":
                out.append(("out", ast.Constant(text)))
            elif kind == "out":
                node = self.parse(text)
                out += self.choose([(node.test, [("out", node.body)]), (None, [("out", node.orelse)])]) if isinstance(
                    node, ast.IfExp) else [("out", node)]
            elif word == "if":
                out += self.arms(rest)
            elif word == "for":
                outer, self.content = self.loop_name, "unset"
                if over := re.match(r"(\w+) in (?:loop_)?messages\b", rest):
                    self.loop_name = over[1]
                    rest = "message" + rest[len(over[1]):]
                out.append(("for", " ".join(rest.split()), self.closed("endfor")))
                self.loop_name, self.content = outer, "unset"
            elif word == "macro":
                outer, self.loop_name = self.loop_name, (re.findall(r"\((\w+)\)", rest) or [""])[0]
                self.macros[rest.partition("(")[0].strip()] = self.closed("endmacro")
                self.loop_name = outer
            elif word == "set" and "=" in rest:
                name, _, value = rest.partition("=")
                text = f"{name.strip()} = {ast.unparse(self.parse(value))}"
                out += [] if IDLE.fullmatch(text) else [("set", text)]
                if name.strip() == "content":
                    self.content = "given" if text == "content = content" and self.content != "changed" else "changed"
            elif word == "break":
                out.append(("set", word))
            elif word not in ("generation", "endgeneration"):
                raise NotUnderstood(text)
        if until:
            raise NotUnderstood(f"no {until[-1]}")
        return out

    def closed(self, end: str) -> list[tuple]:
        inner = self.body((end,))
        self.at += 1
        return inner

    def arms(self, rest: str) -> list[tuple]:
        arms, test, before, after, certain = [], self.parse(rest), self.content, set(), False
        while True:
            self.content = before
            inner = self.body(("elif", "else", "endif"))
            arms.append((test, inner))
            holds = True if test is None else condition(test)[0]
            after |= {self.content} if holds is not False and not certain else set()
            certain = certain or holds is True
            text = self.queue[self.at][1]
            self.at += 1
            if text.startswith("endif"):
                after |= set() if certain else {before}
                self.content = next(state for state in ("unset", "changed", "given") if state in after)
                return self.choose(arms)
            self.content = before
            test = self.parse(text[4:]) if text.startswith("elif") else None

    def choose(self, arms: list[tuple[ast.expr | None, list[tuple]]]) -> list[tuple]:
        """The arms that some conversation reaches."""
        kept: list[tuple[str, list[tuple]]] = []
        for test, inner in arms:
            value, rest = (True, "") if test is None else condition(test)
            earlier = {part for text, _ in kept for part in text.strip("()").split(" or ")}
            if value is False or (value is None and rest in earlier):
                continue
            kept.append(("" if value else rest, inner))
            if value:
                break
        while kept and not any(node != ("out", "") and not is_empty(node) for node in kept[-1][1]):
            kept.pop()
        return kept[0][1] if kept and not kept[0][0] else [("if", kept)] if kept else []


def is_empty(node: tuple) -> bool:
    return node[0] == "out" and isinstance(node[1], ast.Constant) and node[1].value == ""


def lines(nodes: list[tuple], depth: str = "") -> list[str]:
    """The tree as indented lines; texts written one after the other are one."""
    out: list[str] = []
    texts: list[ast.expr] = []
    for node in [*nodes, ("end",)]:
        if node[0] == "out":
            texts += terms(node[1])
            continue
        if texts:
            out.append(f"{depth}out {ast.unparse(joined(texts))}")
            texts = []
        if node[0] == "set":
            out.append(f"{depth}set {node[1]}")
        elif node[0] == "for":
            inner = lines(node[2], depth + "  ")
            out += [f"{depth}for {node[1]}", *inner] if inner else []
        elif node[0] == "if":
            for i, (test, inner) in enumerate(node[1]):
                out += [depth + (("elif " if i else "if ") + test if test else "else"), *lines(inner, depth + "  ")]
    return out
