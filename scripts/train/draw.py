"""Numbers -> SVG: curves and bars with plain axes, readable in light and in dark, with a text in place of the picture.

No library: an SVG is a text, and the same numbers give the same bytes.
"""

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from textwrap import wrap

from .show import thin

WIDTH = 720
STYLE = """
text{font:13px system-ui,sans-serif;fill:#1f2328}
.paper{fill:#fff}.head{font-weight:600;font-size:15px}.soft{fill:#59636e;font-size:12px}.end{text-anchor:end}
.middle{text-anchor:middle}.mono{font-family:ui-monospace,monospace;font-size:12px}
.axis{stroke:#8c959f}.grid{stroke:#d8dee4}.thin{stroke-width:1;opacity:.55}.dash{stroke-dasharray:4 3}
path{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}rect,circle,.label{fill:currentColor}
.a{color:#0969da}.b{color:#bc4c00}.c{color:#1a7f37}.g{color:#8c959f}
@media (prefers-color-scheme:dark){
text{fill:#e6edf3}.paper{fill:#0d1117}.soft{fill:#9198a1}.axis{stroke:#656c76}.grid{stroke:#2a313a}
.a{color:#4493f8}.b{color:#f0883e}.c{color:#3fb950}.g{color:#7d8590}.label{fill:currentColor}}
"""


class Picture:
    """What is drawn so far. `kind` is one or more classes of STYLE; a, b, c and g are colors."""

    def __init__(self, height: int):
        self.height, self.parts = height, []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words, quote=False)}</text>')

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{way}" class="{kind}"/>')

    def bar(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"/>')

    def dot(self, x: float, y: float, kind: str) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" class="{kind}"/>')

    def svg(self, title: str, description: str) -> str:
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(title, quote=False)}</title>',
            f'<desc id="desc">{escape(description, quote=False)}</desc>', f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{self.height}" rx="8" class="paper"/>', *self.parts, "</svg>", ""])


class Axes:
    """Where values (x, y) lie in a picture; the y axis is linear or logarithmic."""

    def __init__(self, picture: Picture, box: tuple[float, float, float, float], x: tuple[float, float],
                 y: tuple[float, float], log: bool = False):
        self.picture, (self.left, self.top, self.width, self.height) = picture, box
        self.xs, self.scale = x, math.log if log else float
        self.ys = tuple(map(self.scale, y))

    def place(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.xs, self.ys
        return (self.left + self.width * (x - x0) / (x1 - x0),
                self.top + self.height * (y1 - self.scale(y)) / (y1 - y0))

    def draw(self, xs: Sequence[float], ys: Sequence[float], name: Callable[[float], str] = "{:g}".format) -> None:
        """Both axes with labels at these values."""
        right, bottom = self.left + self.width, self.top + self.height
        for y in ys:
            _, at = self.place(self.xs[0], y)
            self.picture.line([(self.left, at), (right, at)], "grid thin")
            self.picture.text(self.left - 8, at + 4, name(y), "soft end")
        self.picture.line([(self.left, bottom), (right, bottom)], "axis thin")
        for x in xs:
            at, _ = self.place(x, 0 if self.scale is float else 1)
            words, kind = (f"{x:,} steps", "soft end") if x == xs[-1] else (f"{x:,}", "soft middle")
            self.picture.text(at, bottom + 18, words, kind)

    def curve(self, points: Sequence[tuple[float, float]], kind: str) -> tuple[float, float]:
        """Returns where it ends."""
        places = [self.place(x, y) for x, y in points]
        self.picture.line(places, kind)
        return places[-1]


def middles(values: Sequence, steps: int) -> list[float]:
    """The middle steps of len(values) equal parts of a run."""
    return [(i + 0.5) * steps / len(values) for i in range(len(values))]


def apart(places: list[float], gap: float) -> list[float]:
    """The heights of labels, moved so that no two are nearer than `gap`; the order stays."""
    order, moved = sorted(range(len(places)), key=places.__getitem__), list(places)
    for above, below in zip(order, order[1:]):
        moved[below] = max(moved[below], moved[above] + gap)
    shift = sum(map(float.__sub__, moved, places)) / len(places)  # so that they move up as much as down
    return [place - shift for place in moved]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, … between the two; of a wide range the powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    leads = (1, 2, 5) if len(powers) < 5 else (1,)
    ticks = [float(f"{lead}e{power}") for power in powers for lead in leads]
    return [tick for tick in ticks if low <= tick <= high]


def draw_schedule(numbers: dict) -> str:
    steps, warm_up, points = numbers["steps"], numbers["warm_up"], numbers["points"]
    picture = Picture(230)
    picture.text(24, 30, "The schedule: a factor on the learning rate", "head")
    axes = Axes(picture, (60, 60, 620, 130), (0, steps), (0, 1))
    axes.draw([0, 500, 1000, 1500, 2000, steps], [0, 0.5, 1])
    axes.curve(points, "a")
    x, y = axes.place(warm_up, 1)
    picture.text(x + 12, y - 8, f"up in {warm_up} steps, while the optimizer gets to know the gradients", "a label")
    x, y = axes.place(steps * 0.5, 0.5)
    picture.text(x + 34, y - 22, "down in a straight line to 0: ever smaller", "a label")
    picture.text(x + 34, y - 6, "steps settle what the large ones left rough", "a label")
    return picture.svg("The learning rate over a training", (
        f"The factor on the learning rate rises in a straight line from {points[0][1]:g} to 1 in the first {warm_up} "
        f"steps, then falls in a straight line to 0 at step {steps:,}."))


def draw_optimizers(numbers: dict) -> str:
    steps, runs = numbers["steps"], numbers["runs"]
    picture, losses = Picture(320), [loss for run in runs.values() for loss in run["losses"]]
    picture.text(24, 30, "The same model and the same batches, moved by three optimizers", "head")
    picture.text(24, 50, "loss, in nats, on a logarithmic scale", "soft")
    axes = Axes(picture, (50, 64, 450, 216), (0, steps), (min(losses) / 1.1, max(losses) * 1.02), log=True)
    axes.draw([0, steps // 2, steps], [y for y in range(1, 10) if min(losses) < y < max(losses)])
    ends = [axes.curve(list(zip(middles(run["losses"], steps), run["losses"])), color)
            for run, color in zip(runs.values(), "bca")]
    for (name, run), color, height in zip(runs.items(), "bca", apart([y for _, y in ends], 38)):
        picture.text(510, height - 8, name, f"{color} label")
        end = run["ends"][f"{run['rate']:g}"]
        picture.text(510, height + 8, f"best rate {run['rate']:g}: ends at {end:.2f}", "soft")
    tried = "; ".join(name + ": " + ", ".join(f"{end:.2f} with {rate}" for rate, end in run["ends"].items())
                      for name, run in runs.items())
    return picture.svg("Loss over steps with SGD, AdamW and Muon", (
        f"A small qwen3 (hidden size 64, 3 layers, vocabulary {numbers['vocabulary']}) learns for {steps} steps. "
        f"Each curve is the best of the rates that were tried. Loss at the end by rate: {tried}. Muon moves the "
        "matrices of the layers, AdamW the embedding and the norms beside it, both with the same rate."))


def draw_balance(numbers: dict) -> str:
    runs, E = numbers["runs"], len(numbers["runs"]["with"]["layers"][0])
    layers = len(runs["with"]["layers"])
    picture = Picture(110 + 92 * layers)
    tallest = max(map(max, runs["without"]["layers"] + runs["with"]["layers"]))
    picture.text(24, 30, f"Which experts are chosen, in % of all choices ({E} experts in each layer)", "head")
    for (name, run), left, color in zip(runs.items(), (72, 410), "ba"):
        picture.text(left, 58, f"{name} the balance loss", f"{color} label")
        picture.text(left + 286, 58, f"loss of the text {run['loss']:.2f}", "soft end")
        for layer, shares in enumerate(run["layers"]):
            floor = 148 + 92 * layer
            for e, share in enumerate(shares):
                height = max(1, 60 * share / tallest)
                picture.bar(left + 36 * e, floor - height, 30, height, color)
                picture.text(left + 36 * e + 15, floor + 14, str(e), "soft middle")
            even = floor - 60 / E / tallest
            picture.line([(left - 6, even), (left + 288, even)], "axis thin dash")
            for e, share in enumerate(shares):  # on a patch that interrupts the dashes
                top = floor - max(1, 60 * share / tallest)
                picture.bar(left + 36 * e + 5, top - 15, 20, 14, "paper")
                picture.text(left + 36 * e + 15, top - 4, f"{100 * share:.0f}", "soft middle")
            if left == 72:
                picture.text(60, floor - 20, f"layer {layer + 1}", "soft end")
    words = f"below the bars: the expert's number; dashed: an even share, {100 / E:g} %"
    picture.text(24, picture.height - 16, words, "soft")
    least, most = ([f(map(f, run["layers"])) for run in runs.values()] for f in (min, max))
    return picture.svg("The load of the experts with and without the balance loss", (
        f"A small qwen3_moe after {numbers['steps']} steps. Without the balance loss the busiest expert gets "
        f"{100 * most[0]:.0f} % of its layer's choices and the idlest {100 * least[0]:.2f} %; with it "
        f"{100 * most[1]:.0f} % and {100 * least[1]:.1f} %. An even share is {100 / E:g} %. "
        f"The loss of the text is {runs['without']['loss']:.2f} without and {runs['with']['loss']:.2f} with it."))


def draw_bias(numbers: dict) -> str:
    steps, window, without, found = numbers["steps"], numbers["window"], *numbers["runs"].values()
    ends, E = found["bias"][-1], len(found["bias"][-1])
    load = [sum(row[e] for row in without["load"][-5:]) for e in range(E)]
    tallest, widest = max(map(max, without["load"] + found["load"])), max(map(abs, sum(found["bias"], [])))
    step = max(tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2) if tick <= max(widest, 0.01))
    picture, even, extremes = Picture(316), f"{1 / E:.1%}", (ends.index(min(ends)), ends.index(max(ends)))
    picture.text(24, 30, "A bias moves against the load: one layer of a small deepseek_v3", "head")
    # heading, what is under it, the values, which two experts are marked, and the axis
    panels = [("choices, without the bias", ("some experts are busy,", "others idle"), without["load"],
               (load.index(max(load)), load.index(min(load))), (0, tallest), [0, 0.1, 0.2], "{:.0%}"),
              ("choices, with the bias", ("all come near", f"an even share, {even}"), found["load"],
               extremes, (0, tallest), [0, 0.1, 0.2], "{:.0%}"),
              ("the bias", ("down where an expert is", "busy, up where it is idle"), found["bias"],
               extremes, (-widest, widest), [-step, 0, step], "{:+g}")]
    for left, (head, below, table, marked, y, ticks, form) in zip((56, 286, 516), panels):
        axes = Axes(picture, (left, 78, 150, 160), (0, steps), y)
        picture.text(left, 60, head)
        axes.draw([0, steps], ticks, lambda value: form.format(value) if value else "0")
        for e in sorted(range(E), key=marked.__contains__):  # the gray ones first
            kind = dict(zip(marked, "ba")).get(e, "g thin")
            axes.curve([(x, row[e]) for x, row in zip(middles(table, steps), table)], kind)
        for height, e, color in zip(apart([axes.place(0, table[-1][e])[1] for e in marked], 14), marked, "ba"):
            picture.text(left + 153, height + 4, str(e), f"{color} label")
        for i, words in enumerate(below):
            picture.text(left, 282 + 16 * i, words, "soft")
    shares = [[sum(row[e] for row in run["load"][-5:]) / 5 for e in range(E)] for run in (without, found)]
    (least, most), (least_with, most_with) = ((min(each), max(each)) for each in shares)
    return picture.svg("The load of the experts of one layer, and the bias that evens it", (
        f"A small deepseek_v3 over {steps} steps, in windows of {window}. Without the bias the shares of the {E} "
        f"experts end between {least:.1%} and {most:.1%} of the choices; with it between {least_with:.1%} and "
        f"{most_with:.1%}, where an even share is {even}. The biases end between {min(ends):+.2f} (expert "
        f"{extremes[0]}) and {max(ends):+.2f} (expert {extremes[1]}). The numbers at the curves are the experts'."))


def without_repeats(answer: str) -> str:
    """A word that is said more than five times in a row is counted instead."""
    def count(match: re.Match) -> str:
        return f"{match[1]} {match[1]} {match[1]} … ({len(match[0].split())} times)"
    return re.sub(r"(?<!\S)(\S+)(?: \1){5,}(?!\S)", count, answer)


def draw_says(numbers: dict) -> str:
    steps, losses, answers = numbers["steps"], numbers["losses"], numbers["answers"]
    picture = Picture(92 + 54 * len(answers))
    picture.text(24, 30, f"“{numbers['question']}” asked again and again while the loss falls", "head")
    axes = Axes(picture, (50, 70, 190, 54 * len(answers) - 26), (0, steps), (0, math.ceil(losses[0])))
    axes.draw([0, steps // 2, steps], range(0, math.ceil(losses[0]) + 1, 2))
    points = [(0, losses[0]), *zip(middles(losses, steps), losses), (steps, losses[-1])]
    axes.curve(points, "a")
    picture.text(24, 54, "loss", "soft")
    picture.text(266, 54, f"a small qwen3 that learns {numbers['words']} entries of the glossary", "soft")
    for row, (step, answer) in enumerate(answers):
        height = 84 + 54 * row
        x, y = axes.place(step, min(points, key=lambda point: abs(point[0] - step))[1])
        picture.dot(x, y, "a")
        picture.text(266, height, f"step {step}", "a label")
        for i, words in enumerate(wrap(without_repeats(answer), 50, max_lines=3, placeholder=" …")):
            picture.text(338, height + 16 * i, words, "mono")
    said = "; ".join(f"after {step} steps: {without_repeats(answer)[:150]}" for step, answer in answers)
    return picture.svg("What a model answers while it learns", (
        f"A small qwen3 learns {numbers['words']} entries of the glossary, not the whole corpus, in {steps} steps; the "
        f"loss falls from {losses[0]:.1f} to {losses[-1]:.2f}. {numbers['question']} {said}"))


def draw_loss(numbers: dict) -> str:
    steps, losses = numbers["steps"], numbers["losses"]
    picture = Picture(320)
    picture.text(24, 30, f"The loss of a whole training, {steps:,} steps", "head")
    picture.text(24, 50, "loss, in nats, on a logarithmic scale", "soft")
    low, high = min(losses), max(losses)
    axes = Axes(picture, (60, 64, 630, 216), (0, steps), (low / 1.1, high * 1.1), log=True)
    axes.draw([0, steps // 2, steps], log_ticks(low / 1.1, high * 1.1))
    axes.curve(list(zip(middles(losses, steps), losses)), "a thin")
    smooth = thin(losses, 60)  # means of neighbors: single batches differ
    x, _ = axes.curve(list(zip(middles(smooth, steps), smooth)), "a")
    _, y = axes.place(steps, max(losses[-len(losses) // 3:]))  # above all that the label could cross
    first, last = numbers["first"], numbers["last"]
    x0, y0 = axes.place(0, first)
    picture.text(x0 + 22, y0 + 8, f"{first:.2f}: as unsure as between {math.exp(first):,.0f} tokens", "a label")
    picture.text(x, y - 26, f"{last:.3g}: as unsure as", "a label end")
    picture.text(x, y - 10, f"between {math.exp(last):,.2f} tokens", "a label end")
    return picture.svg("The loss of a whole training", (
        f"The loss over {steps:,} steps, on a logarithmic scale, falls from {first:.2f} (as unsure as between "
        f"{math.exp(first):,.0f} equally likely tokens) to {last:.3g} (as between {math.exp(last):,.2f})."))


DRAW = {"schedule": draw_schedule, "optimizers": draw_optimizers, "balance": draw_balance, "bias": draw_bias,
        "says": draw_says, "loss": draw_loss}
