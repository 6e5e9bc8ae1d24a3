"""The same without a page: the lens as a table, the choice as bars, a head's attention as shaded text."""

import math
import shutil
from base64 import b64decode

SHADES = " ░▒▓█"


def report(data: dict, width: int | None = None) -> str:
    """The answer's hardest token, seen three ways, at most `width` columns."""
    width, run = width or shutil.get_terminal_size((100, 24)).columns, data["runs"][0]
    if not run["steps"]:
        return "nothing was recorded: the answer has no token"
    r = hardest(run)
    token, before = (shown(data, run["tokens"][run["steps"][r] + more]) for more in (1, 0))
    parts = [f"token {run['steps'][r] + 1}: having read {before!r}, it wrote {token!r}",
             f"what it would have said after each layer; {SHADES[1:]} from unsure to sure", lens(data, run, r, width),
             f"how {token!r} was chosen", choice(data, run, r, width)]
    if run["attention"]["whole"]:
        layer, head = sharpest(run, r)
        parts += [f"where layer {layer}, head {head} looked then", attention(data, run, r, layer, head, width)]
    return "\n".join(parts)


def shown(data: dict, id: int) -> str:
    return data["words"][id].replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")


def hardest(run: dict) -> int:
    """The step of the answer whose token had the least chance over all depths: where there is most to see."""
    answer = [r for r, position in enumerate(run["steps"]) if position + 1 >= run["prompt"]]
    return min(answer or range(len(run["steps"])), key=lambda r: sum(run["lens"]["written"][r]))


def lens(data: dict, run: dict, around: int, width: int) -> str:
    """The logit lens as text: a row for each layer, a column for each token around row `around`."""
    columns = max(1, (width - 12) // 11)
    steps = range(len(run["steps"]))
    steps = steps[max(0, min(around - columns // 2, len(steps) - columns)):][:columns]
    line = " ".join(shown(data, run["tokens"][run["steps"][r]])[:8].ljust(8) + ("◂ " if r == around else "  ")
                    for r in steps)
    lines = [f"{'reads':10} │ {line}"]
    for depth in range(run["L"] + 1):
        cells = []
        for r in steps:
            id, chance = run["lens"]["top"][r][depth][0]
            cells.append(shown(data, id)[:8].ljust(8) + SHADES[1 + round(3 * chance)] + " ")
        lines.append(f"{f'layer {depth - 1}' if depth else 'embedding':10} │ " + " ".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def choice(data: dict, run: dict, r: int, width: int, rows: int = 5) -> str:
    step = run["choice"]["steps"][r]
    entries = list(zip(step["ids"], step["chances"]))[:rows]
    if step["written"][0] not in dict(entries):
        entries.append((step["written"][0], step["written"][2]))
    room = max(10, width - 34)
    return "\n".join(f"{shown(data, id)[:12]:12} {'█' * round(room * chance) or '▏'} {chance:.1%}"
                     + (" ← written" if id == step["written"][0] else "") for id, chance in entries)


def shares(run: dict, r: int, layer: int, head: int) -> list[float]:
    """How much one head looked at each token, of a recording that is whole."""
    kept, sizes = run["attention"], [position + 1 for position in run["steps"]]
    start = (layer * kept["H"] + head) * sum(sizes) + sum(sizes[:r])
    return [(byte / 255) ** 2 for byte in b64decode(kept["data"])[start:start + sizes[r]]]


def sharpest(run: dict, r: int) -> tuple[int, int]:
    """The head that looks hardest at one token which is neither the first nor the last."""
    heads = [(layer, head) for layer in range(run["L"]) for head in range(run["attention"]["H"])]
    return max(heads, key=lambda one: max(shares(run, r, *one)[1:-1], default=0))


def attention(data: dict, run: dict, r: int, layer: int, head: int, width: int) -> str:
    """The text, with the darkest shade before the tokens that the head looked at most."""
    lines, line = [], ""
    for id, share in zip(run["tokens"], shares(run, r, layer, head)):
        text = (SHADES[min(4, math.ceil(4 * math.sqrt(share)))] if share > 0.02 else "") + shown(data, id)
        if len(line) + len(text) > width:
            lines, line = [*lines, line], ""
        line += text
        if line.endswith("⏎"):
            lines, line = [*lines, line], ""
    return "\n".join([*lines, line]).rstrip()
