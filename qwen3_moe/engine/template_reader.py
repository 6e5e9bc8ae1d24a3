"""A chat template, read without running it: its text -> the statements that a conversation without tools can reach.

A template is a program in Jinja. Here it is only read: cut into tags, each expression parsed and written in one
spelling (template_expressions.py), and the branches for tools, images and documents struck out. What is left, some
twenty lines, can be compared with what chat_formats.py renders (see templates.py). Nothing of a template is ever
executed.

    {%- if tools %}…{%- else %}{%- if messages[0]["role"] == "system" %}…      ->     if messages[0].role == 'system'
"""

import ast
import re

from .template_expressions import STRING, NotUnderstood, condition, joined, parse, terms

BODY = rf"(?:{STRING}|[^'\"{{]|\{{(?![{{%#]))*?"
TAG = re.compile(rf"(?P<comment>\{{#.*?#\}})|\{{%(?P<open>[-+]?)(?P<tag>{BODY})(?P<shut>[-+]?)%\}}"
                 rf"|\{{\{{(?P<before>-?)(?P<out>{BODY})(?P<after>-?)\}}\}}", re.S)
LONGEST = 40_000  # characters; published templates have up to 16,000

# Statements that change nothing in a conversation without tools.
IDLE = re.compile("|".join([
    r"content = content", r"ns\.(is_tool|is_first|is_output_first|is_tool_outputs) = false",
    r"tools = (none|None|\[\])", r"(image_count|video_count|tool_call_counter) = namespace\(value=0\)",
    r"tool_response_queue = namespace\(ids=\[\]\)", r"last_index = messages\._length - 1"]))


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


class Reader:
    """Tags in turn -> a tree of ("out", expression), ("set", text), ("if", arms), ("for", what, body)."""

    def __init__(self, template: str):
        self.queue, self.at, self.loop_name, self.macros = cut(template), 0, "message", {}
        self.content = "unset"  # what the variable `content` is at this place

    def parse(self, code: str) -> ast.expr:
        return parse(code, self.loop_name, self.content)

    def body(self, until: tuple[str, ...]) -> list[tuple]:
        """The nodes up to a tag that begins with a word of `until`. Raises NotUnderstood for a tag of another kind."""
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
                if isinstance(node, ast.IfExp):
                    out += self.choose([(node.test, [("out", node.body)]), (None, [("out", node.orelse)])])
                else:
                    out.append(("out", node))
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
        """An if with all its arms, of which `rest` is the first condition; what no conversation reaches is left out."""
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
