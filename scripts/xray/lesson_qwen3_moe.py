"""Numbers -> SVG: the pictures of qwen3_moe's lesson."""

import math

from ..train.draw import Axes, apart
from .drawings import TEXT_SHADE, Shaded, percent

BILLIONS = "billion parameters"


def draw_layer(numbers: dict) -> str:
    chosen, chances, logits = numbers["chosen"], numbers["chances"], numbers["logits"]
    picture, tallest, left, step = Shaded(380), max(chances), 200, 62
    colors = dict(zip(chosen, "ab"))
    picture.text(24, 30, f"The token {numbers['word']} in layer {numbers['layer']}: two of eight experts work", "head")
    picture.frame(24, 86, 120, 44, "axis thin")
    picture.text(84, 105, "x, the normed", "middle")
    picture.text(84, 121, f"vector, length {numbers['input']:.1f}", "soft middle")
    picture.line([(144, 108), (176, 108)], "axis")
    picture.text(left - 24, 56, "the router's scores and, as bars, their softmax", "soft")
    for e, (chance, score) in enumerate(zip(chances, logits)):
        x, kind = left + step * e, colors.get(e, "g")
        height = 62 * chance / tallest
        picture.bar(x, 140 - height, 38, height, kind)
        picture.text(x + 19, 134 - height, f"{score:+.2f}", "soft middle")
        picture.text(x + 19, 156, percent(chance), "soft middle")
        picture.cell(x - 6, 186, 50, 40, TEXT_SHADE if e in colors else 0.12, kind)
        picture.text(x + 19, 204, "expert", "middle")
        picture.text(x + 19, 219, str(e), "middle")
        if e in colors:
            picture.line([(x + 19, 162), (x + 19, 184)], kind)
    picture.line([(176, 108), (176, 206), (left - 6, 206)], "axis")
    picture.line([(left - 24, 140), (left + step * 8 - 20, 140)], "axis thin")
    end = left + step * (sum(chosen) / len(chosen)) + 19
    for e, weight, length in zip(chosen, numbers["weights"], numbers["lengths"]):
        x, kind = left + step * e + 19, colors[e]
        picture.line([(x, 228), (x, 286), (end, 318)], kind)
        side = "label" if x > end else "label end"
        shift = 8 if x > end else -8
        picture.text(x + shift, 250, f"output of length {length:.1f}", f"{kind} {side}")
        picture.text(x + shift, 268, f"times {weight:.2f}", f"{kind} {side}")
    picture.ring(end, 330, 12)
    picture.text(end, 335, "+", "middle")
    picture.text(end - 22, 335, f"y, of length {numbers['result']:.1f}", "end")
    both = sum(chances[e] for e in chosen)
    parts = ", ".join(f"{chances[e]:.3f} / {both:.3f} = {weight:.2f}" for e, weight in zip(chosen, numbers["weights"]))
    picture.text(24, 366, f"the two chances add up to {both:.3f}; divided by that: {parts}", "soft")
    return picture.svg("One token in a layer of experts", (
        f"Qwen3-MoE-Tiny reads “{numbers['question']}”. For the token {numbers['word']} the router of layer "
        f"{numbers['layer']} gives the scores {', '.join(map(str, logits))}. Experts {chosen[0]} and {chosen[1]} are "
        f"chosen with weights {numbers['weights'][0]:.2f} and {numbers['weights'][1]:.2f}; their weighted sum has "
        f"length {numbers['result']:.1f}. The other six do nothing."))


def draw_cost(numbers: dict) -> str:
    picture, most, width = Shaded(74 + 64 * len(numbers)), max(map(max, numbers.values())), 500
    picture.text(24, 30, "What a model holds, and what one token uses of it", "head")
    said = []
    for row, (name, (total, used)) in enumerate(numbers.items()):
        y = 56 + 64 * row
        picture.text(24, y + 12, name)
        picture.cell(24, y + 20, width * total / most, 18, 0.3, "g")
        picture.bar(24, y + 20, max(2, width * used / most), 18, "a")
        picture.text(32 + width * total / most, y + 34, f"{total:g}, used {used:g} ({percent(used / total)})", "soft")
        said.append(f"{name} {total:g}, of which a token uses {used:g}")
    picture.text(24, picture.height - 14, f"in {BILLIONS}; blue: what one token uses", "soft")
    return picture.svg("Parameters, and those that one token uses", f"In {BILLIONS}: {'; '.join(said)}.")


def draw_learns(numbers: dict) -> str:
    runs, outputs, steps = numbers["runs"], numbers["outputs"], numbers["steps"]
    every = [score for run in runs.values() for row in run for score in row]
    picture = Shaded(316)
    head = f"The scores of four experts, while the loss asks for the answer {numbers['target']:g}"
    picture.text(24, 30, head, "head")
    picture.text(24, 50, "the experts say " + ", ".join(f"{e}: {value:g}" for e, value in enumerate(outputs)), "soft")
    below = {"two, renormalized": ("what is not chosen", "does not move"),
             "two, as they are": ("the others are pushed", "down, too"),
             "one, renormalized": ("its weight is always 1:", "nothing is learned")}
    said = []
    for left, (name, run) in zip((50, 276, 502), runs.items()):
        axes = Axes(picture, (left, 92, 156, 150), (0, steps), (min(every) - 0.2, max(every) + 0.2))
        picture.text(left, 78, name)
        axes.draw([0, steps], range(math.ceil(min(every)), math.floor(max(every)) + 1), lambda y: f"{y:g}")
        ends = []
        for e, kind in enumerate(("b", "g", "a", "g dash")):
            ends.append(axes.curve([(step, row[e]) for step, row in enumerate(run)], kind)[1])
        for e, (y, kind) in enumerate(zip(apart(ends, 14), "bgag")):
            picture.text(left + 161, y + 4, str(e), f"{kind} label" if kind != "g" else "soft")
        for i, words in enumerate(below[name]):
            picture.text(left, 284 + 16 * i, words, "soft")
        said.append(f"{name}: from {', '.join(f'{v:g}' for v in run[0])} to {', '.join(f'{v:.2f}' for v in run[-1])}")
    return picture.svg("How the scores of a router move", (
        f"Gradient descent, {steps} steps of {numbers['rate']:g}, towards {numbers['target']:g}. The scores of the "
        f"experts 0 to 3, {'; '.join(said)}."))


def draw_fine(numbers: dict) -> str:
    cuts, width, row = numbers["cuts"], 470, 62
    picture = Shaded(84 + row * len(cuts))
    picture.text(24, 30, "The same parameters, the same work, cut finer", "head")
    picture.text(24, 52, f"each bar is one layer, {numbers['total']:,} wide; blue: what one token uses", "soft")
    said = []
    for i, (experts, active, each, ways) in enumerate(cuts):
        y, step = 72 + row * i, width / experts
        used = {int((j + 0.37) * experts / active) for j in range(active)}  # any choice would do
        for e in range(experts):
            gap = 2 if experts < 64 else 0.8
            picture.cell(24 + step * e, y, step - gap, 22, 1 if e in used else 0.3, "a" if e in used else "g")
        picture.text(24, y + 40, f"{experts} experts of width {each:,}, {active} chosen", "soft")
        count = f"{ways:,}" if ways < 1e7 else f"{ways / 1e12:.1f} million million"
        picture.text(506, y + 16, f"{count} ways", "a label")
        said.append(f"{experts} experts of width {each:,} with {active} chosen: {ways:,} ways")
    return picture.svg("Fine-grained experts", f"{'; '.join(said)}. Parameters and work for a token stay the same.")


def draw_routes(numbers: dict) -> str:
    tokens, layers, width, height = numbers["tokens"], numbers["chosen"], 31, 42
    picture = Shaded(132 + height * len(layers))
    picture.text(24, 30, "Which two experts each token goes to, in each layer", "head")
    short = {"<|im_start|>": "[", "<|im_end|>": "]", "assistant": "asst"}
    digits = [t for t, word in enumerate(tokens) if word.isdigit()]
    for t, word in enumerate(tokens):
        x = 76 + width * t + width / 2
        picture.text(x, 62, short.get(word, word), "mono middle")
    for i, (chosen, first) in enumerate(zip(layers, numbers["first"])):
        y = 72 + height * i
        picture.text(68, y + 24, f"layer {i}", "soft end")
        for t, ((one, other), weight) in enumerate(zip(chosen, first)):
            x, kind = 76 + width * t, "b" if t in digits else "a"
            picture.cell(x + 1, y + 1, width - 2, height - 2, TEXT_SHADE * (2 * weight - 1) + 0.05, kind)
            picture.text(x + width / 2, y + 18, str(one), "middle")
            picture.text(x + width / 2, y + 35, str(other), "mono middle")
    foot = picture.height - 36
    picture.text(24, foot, "above: the first choice, below: the second; the fuller the cell, the more the first one "
                 "weighs", "soft")
    picture.text(24, foot + 18, "orange: digits; [ and ] are <|im_start|> and <|im_end|>, · is a blank, ⏎ a line break",
                 "soft")
    said = "; ".join(f"layer {i}: " + ", ".join(f"{tokens[t]} to {layer[t][0]}" for t in digits)
                     for i, layer in enumerate(layers))
    return picture.svg("The routes of a prompt's tokens", (
        f"Qwen3-MoE-Tiny reads “{numbers['question']}”. The digits' first choices, {said}."))


def draw_dispatch(numbers: dict) -> str:
    words, chosen, A = numbers["words"], numbers["chosen"], len(numbers["chosen"][0])
    by_expert, order, size = numbers["by_expert"], numbers["order"], 50
    flat = [e for row in chosen for e in row]
    picture, colors = Shaded(356), dict(zip(sorted(set(flat)), "acgb"))
    picture.text(24, 30, f"Dispatch in layer {numbers['layer']}: six tokens, two choices each", "head")
    for t, word in enumerate(words):
        x = 84 + size * A * t
        picture.text(x + size * A / 2 - 3, 66, f"token {word}", "mono middle")
        picture.line([(x, 74), (x + size * A - 6, 74)], "axis thin")
    for place, e in enumerate(flat):
        picture.cell(84 + size * place, 80, size - 6, 26, TEXT_SHADE, colors[e])
        picture.text(84 + size * (place + 0.5) - 3, 98, str(e), "middle")
    for at, place in enumerate(order):
        x, y = 84 + size * (at + 0.5) - 3, 84 + size * (place + 0.5) - 3
        picture.line([(y, 108), (x, 196)], f"{colors[flat[place]]} thin")
        picture.cell(84 + size * at, 198, size - 6, 26, TEXT_SHADE, colors[by_expert[at]])
        picture.text(x, 216, str(by_expert[at]), "middle")
        picture.text(x, 242, words[place // A], "mono middle")
    picture.text(76, 98, "by token", "soft end")
    picture.text(76, 216, "sorted", "soft end")
    picture.text(76, 242, "rows of x", "soft end")
    said = []
    for e in sorted(set(flat)):
        begin, count = by_expert.index(e), by_expert.count(e)
        left, right = 84 + size * begin, 84 + size * (begin + count) - 6
        picture.line([(left, 252), (left, 258), (right, 258), (right, 252)], f"{colors[e]} thin")
        rows = f"{count} rows" if count > 1 else "1 row"
        picture.text((left + right) / 2, 276, f"expert {e}", "soft middle")
        picture.text((left + right) / 2, 292, rows, "soft middle")
        said.append(f"expert {e} {rows}")
    idle = [str(e) for e in range(numbers["experts"]) if e not in flat]
    picture.text(24, 322, f"{len(flat)} choices, but each expert's matrices are read once: "
                 f"{len(set(flat))} readings instead of {len(flat)}", "soft")
    picture.text(24, 340, f"no token chose the experts {', '.join(idle)}: they are not read at all", "soft")
    return picture.svg("Sorting the choices of six tokens by expert", (
        f"The tokens {' '.join(words)} choose {', '.join(map(str, chosen))}. Sorted by expert: {', '.join(said)}; the "
        f"experts {', '.join(idle)} have nothing to do."))


def draw_batch(numbers: dict) -> str:
    counts, measured, (E, A), (many, active) = (numbers[name] for name in ("counts", "measured", "tiny", "large"))
    picture = Shaded(316)
    picture.text(24, 30, "What share of a layer's experts a step reads, by the size of the batch", "head")
    axes = Axes(picture, (64, 60, 420, 200), (0, math.log2(counts[-1])), (0, 1))
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = axes.place(0, share)
        picture.line([(64, y), (484, y)], "grid thin")
        picture.text(56, y + 4, percent(share), "soft end")
    for n in counts:
        x, _ = axes.place(math.log2(n), 0)
        picture.text(x, 278, str(n), "soft middle")
    grid = [i / 8 for i in range(8 * int(math.log2(counts[-1])) + 1)]
    for of, each, kind in ((many, active, "a"), (E, A, "g dash")):
        axes.curve([(x, 1 - (1 - each / of) ** 2 ** x) for x in grid], kind)
    for n, share in zip(counts, measured):
        picture.dot(*axes.place(math.log2(n), share), "b")
    labels = ((f"{A} of {E}, evenly chosen", "soft"), (f"Qwen3-MoE-Tiny, {A} of {E}", "b label"),
              (f"{active} of {many}, evenly chosen", "a label"))
    for i, (words, kind) in enumerate(labels):
        picture.text(504, 106 + 26 * i, words, kind)
    picture.line([(488, 102), (500, 102)], "g dash")
    picture.dot(494, 128, "b")
    picture.line([(488, 154), (500, 154)], "a")
    picture.text(64, 300, "tokens of a step, each of another text", "soft")
    said = ", ".join(f"{n}: {percent(share)}" for n, share in zip(counts, measured))
    even = ", ".join(f"{n}: {percent(1 - (1 - active / many) ** n)}" for n in counts)
    return picture.svg("The share of the experts that a batch reads", (
        f"Qwen3-MoE-Tiny, by the number of tokens, {said}. With {active} of {many} experts evenly chosen it would be "
        f"{even}."))


def draw_file(numbers: dict) -> str:
    layers, E, row = numbers["layers"], numbers["experts"], 34
    largest = max(layer["rest"] + E * layer["expert"] for layer in layers)
    scale, top = 600 / largest, 88
    picture = Shaded(top + row * (len(layers) + 2) + 52)
    picture.text(24, 30, f"What the token {numbers['word']} reads of the file", "head")
    picture.text(24, 52, "a row for each layer; blue: what every token reads, orange: its experts, gray: not read",
                 "soft")
    read, total = numbers["row"] + numbers["head"], numbers["embedding"] + numbers["head"]

    def piece(x: float, y: float, size: int, kind: str, words: str) -> float:
        picture.cell(x, y, size * scale - 2, 24, 0.3 if kind == "g" else TEXT_SHADE, kind)
        picture.text(x + size * scale / 2 - 1, y + 17, words, "soft middle" if kind == "g" else "middle")
        return x + size * scale

    picture.text(86, top - 2 + 17, "embedding", "soft end")
    piece(94, top - 2, numbers["embedding"], "g", "one row of it is read")
    picture.bar(94, top - 2, 2, 24, "a")
    for i, layer in enumerate(layers):
        x, y = 94.0, top + row * (i + 1) - 2
        picture.text(86, y + 17, f"layer {i}", "soft end")
        x = piece(x, y, layer["rest"], "a", "attention, router")
        for e in range(E):
            x = piece(x, y, layer["expert"], "b" if e in layer["used"] else "g", str(e))
        read += layer["rest"] + len(layer["used"]) * layer["expert"]
        total += layer["rest"] + E * layer["expert"]
    y = top + row * (len(layers) + 1) - 2
    picture.text(86, y + 17, "head", "soft end")
    piece(94, y, numbers["head"], "a", "all of it")
    picture.text(24, picture.height - 18, f"{read / 1e6:.2f} MB of {total / 1e6:.2f} MB are read, "
                 f"{percent(read / total)}", "soft")
    said = "; ".join(f"layer {i} the experts {', '.join(map(str, layer['used']))}" for i, layer in enumerate(layers))
    return picture.svg("The parts of a checkpoint's file that one token reads", (
        f"Qwen3-MoE-Tiny. The token {numbers['word']} reads one row of the embedding, attention and router of each "
        f"layer, the head, and in {said}: {read / 1e6:.2f} MB of {total / 1e6:.2f} MB."))


DRAW = {"moe_layer": draw_layer, "moe_cost": draw_cost, "moe_learns": draw_learns, "moe_fine": draw_fine,
        "moe_routes": draw_routes, "moe_dispatch": draw_dispatch, "moe_batch": draw_batch, "moe_file": draw_file}
