"""Numbers -> SVG: the pictures of the lessons, drawn with the means of the training lesson's.

A shade is an opacity, so that it is right on white and on black. Words stand on half a shade at most.
"""

import math

from ..train.draw import Axes, Picture, apart

TEXT_SHADE = 0.45  # under words: they stay readable in both themes


class Shaded(Picture):
    """A picture with cells that are more or less full of color, and free paths."""

    def cell(self, x: float, y: float, width: float, height: float, share: float, kind: str = "a") -> None:
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}" '
                          f'fill-opacity="{share:.2f}"/>')

    def frame(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        self.line([(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)], kind)

    def ring(self, x: float, y: float, radius: float) -> None:
        arc = f"a{radius} {radius} 0 1 0"
        self.parts.append(f'<path d="M{x - radius:.1f} {y:.1f}{arc} {2 * radius} 0{arc} {-2 * radius} 0" '
                          'class="axis thin"/>')


def percent(share: float) -> str:
    """Nothing is rounded to all or nothing."""
    if 0 < share < 0.01:
        return "< 1 %"
    if 0.99 < share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"


def of_bytes(size: float) -> str:
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10 ** power:
            return f"{size / 10 ** power:.3g} {unit}"
    return f"{size:.0f} bytes"


def draw_attention(numbers: dict) -> str:
    tokens, maps, size, top = numbers["tokens"], numbers["maps"], 19, 92
    side = size * len(tokens)
    picture = Shaded(top + side + 74)
    picture.text(24, 30, "Where three heads look: a row for each token read, a column for each looked at", "head")
    said = []
    for (layer, head), rows, left in zip(numbers["heads"], maps, (66, 290, 514)):
        picture.text(left, 58, f"layer {layer}, head {head}", "a label")
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                if share >= 0.01:
                    picture.cell(left + size * x, top + size * y, size, size, share)
            picture.text(left - 6, top + size * y + 14, tokens[y], "mono end")
        for x, token in enumerate(tokens):
            picture.text(left + size * (x + 0.5), top - 6, token[:2], "mono middle")
        picture.line([(left, top), (left, top + side), (left + side, top + side), (left, top)], "grid thin")
        picture.frame(left, top + side - size, side, size, "b thin")
        share = max(rows[-1])
        at = rows[-1].index(share)
        picture.text(left, top + side + 24, f"then looks at {tokens[at]}: {percent(share)}", "b label")
        said.append(f"layer {layer}, head {head} at {tokens[at]} ({percent(share)})")
    words = f"framed: the last token read, after which the model wrote {numbers['wrote']}; · is a blank"
    picture.text(24, picture.height - 16, words, "soft")
    return picture.svg("Attention of three heads in one line of a sum", (
        f"Qwen3-Tiny, asked “{numbers['question']}”, has read {''.join(tokens).replace('·', ' ')}and writes "
        f"{numbers['wrote']}. Then it looks most: {'; '.join(said)}. No row looks at a later column."))


def draw_lens(numbers: dict) -> str:
    cells, left, width, height, top = numbers["cells"], 100, 84, 26, 78
    chosen, floor = numbers["chosen"], top + height * len(cells)
    picture = Shaded(floor + 92)
    picture.text(24, 30, "The word that norm and head make of each layer's vector", "head")
    for x, (read, came) in enumerate(zip(numbers["reads"], numbers["came"])):
        picture.text(left + width * (x + 0.5), top - 8, read, "mono middle")
        picture.text(left + width * (x + 0.5), floor + 20, came, "mono middle")
    picture.text(left - 10, top - 8, "it reads", "soft end")
    picture.text(left - 10, floor + 20, "then came", "soft end")
    for depth, row in enumerate(cells):
        y = top + height * depth
        picture.text(left - 10, y + 18, f"layer {depth - 1}" if depth else "embedding", "soft end")
        for x, (word, chance) in enumerate(row):
            picture.cell(left + width * x + 1, y + 1, width - 2, height - 2, TEXT_SHADE * math.sqrt(chance))
            picture.text(left + width * (x + 0.5), y + 18, word[:9], "mono middle")
    picture.frame(left + width * chosen, top, width, height * len(cells), "b")
    came, written = numbers["came"][chosen], numbers["written"]
    rise = ", ".join(percent(chance) for chance in written[2::2])
    picture.text(24, floor + 52, f"chance of {came} after each layer: {rise}", "b label")
    picture.text(24, floor + 74, "the fuller the cell, the surer; early layers were never trained to answer", "soft")
    column = "; ".join(f"after {f'layer {depth - 1}' if depth else 'the embedding'} {row[chosen][0]} "
                       f"({percent(row[chosen][1])})" for depth, row in enumerate(cells))
    return picture.svg("The logit lens of one column of a sum", (
        f"Qwen3-Tiny, asked “{numbers['question']}”, is about to write {came}. The likeliest token at each depth: "
        f"{column}. The chance of {came} after each layer: {rise}."))


def draw_clocks(numbers: dict) -> str:
    query, key, step = numbers["query"], numbers["key"], 84
    picture = Shaded(214)
    picture.text(24, 30, f"Hands of clocks: the query of token {query} and the key of token {key}", "head")
    picture.line([(24, 52), (50, 52)], "b")
    picture.text(58, 56, f"token {query}, {numbers['words'][0]}, which is being read", "b label")
    picture.line([(300, 52), (326, 52)], "a dash")
    picture.text(334, 56, f"token {key}, {numbers['words'][1]}, where layer {numbers['head'][0]}, head "
                 f"{numbers['head'][1]} looks most", "a label")
    said = []
    for i, (pair, speed) in enumerate(zip(numbers["pairs"], numbers["frequencies"])):
        x, y, turn = 24 + step * (i + 0.5), 112, 2 * math.pi / speed
        picture.ring(x, y, 30)
        for position, kind in ((key, "a dash"), (query, "b")):
            angle = position * speed
            picture.line([(x, y), (x + 27 * math.sin(angle), y - 27 * math.cos(angle))], kind)
        once = f"{turn:,.0f}" if turn >= 100 else f"{turn:.1f}"
        picture.text(x, 162, f"pair {pair}", "middle")
        picture.text(x, 178, once, "soft middle")
        said.append(f"pair {pair} once round in {once} tokens, {(query - key) * speed:.3g} radians apart")
    picture.text(24, picture.height - 14, "below: after how many tokens a hand is round once", "soft")
    return picture.svg("Rotary position embedding as hands of clocks", (
        f"Angles of some pairs of Qwen3-Tiny at the positions {query} and {key}: {'; '.join(said)}."))


def draw_yarn(numbers: dict) -> str:
    plain, stretched, factor = numbers["plain"], numbers["stretched"], numbers["factor"]
    slowed = [a / b for a, b in zip(plain, stretched)]
    turns = [numbers["trained"] * speed / (2 * math.pi) for speed in plain]
    picture = Shaded(334)
    picture.text(24, 30, "YaRN's ramp: how many times as slowly each pair turns", "head")
    axes = Axes(picture, (84, 66, 606, 170), (0, len(plain) - 1), (1, factor))
    for y in range(1, math.floor(factor) + 1):
        _, at = axes.place(0, y)
        picture.line([(84, at), (690, at)], "grid thin")
        picture.text(68, at + 4, f"{y} ×", "soft end")
    axes.curve(list(enumerate(slowed)), "a")
    for pair, (times, round_) in enumerate(zip(slowed, turns)):
        x, y = axes.place(pair, times)
        picture.dot(x, y, "a")
        picture.text(x, 256, str(pair), "soft middle")
        picture.text(x, 274, f"{round_:,.0f}" if round_ >= 10 else f"{round_:.2g}", "soft middle")
    picture.text(62, 256, "pair", "soft end")
    picture.text(62, 274, "turns", "soft end")
    picture.text(24, 300, f"turns: how often a pair goes round within the {numbers['trained']:,} tokens of training",
                 "soft")
    picture.text(24, 318, f"more than {numbers['fast']:g}: as before; fewer than {numbers['slow']:g}: {factor:g} times "
                 "as slowly", "soft")
    first = next((j for j, times in enumerate(slowed) if times > 1.001), len(slowed))
    last = next((j for j, times in enumerate(slowed) if times > factor - 0.001), len(slowed))
    return picture.svg("YaRN's ramp from pairs that keep their speed to pairs that are slowed", (
        f"DeepSeek-V3-Tiny has {len(plain)} pairs. Those before pair {first} turn as without YaRN, those from pair "
        f"{last} on {factor:g} times as slowly, those between in between: "
        f"{', '.join(f'pair {j} {slowed[j]:.2f} times' for j in range(first, last))}."))


def draw_experts(numbers: dict) -> str:
    layers, (one, other), (first, second) = numbers["layers"], numbers["shares"], numbers["questions"]
    E, row = len(one[0]), 66
    width = 600 / E
    picture, tallest = Shaded(96 + row * len(layers)), max(map(max, one + other))
    picture.text(24, 30, "On what share of its tokens each expert works, for two questions", "head")
    picture.text(84, 54, first, "a label")
    picture.text(330, 54, second, "b label")
    for i, layer in enumerate(layers):
        floor = 118 + row * i
        picture.text(72, floor - 8, f"layer {layer}", "soft end")
        picture.line([(84, floor), (84 + 600, floor)], "axis thin")
        for e in range(E):
            for share, color, shift in ((one[i][e], "a", 0.08), (other[i][e], "b", 0.48)):
                height = max(1, 38 * share / tallest)
                x = 84 + width * (e + shift)
                picture.bar(x, floor - height, width * 0.36, height, color)
                picture.text(x + width * 0.18, floor - height - 4, f"{100 * share:.0f}", "soft middle")
            picture.text(84 + width * (e + 0.46), floor + 13, str(e), "soft middle")
    picture.text(24, picture.height - 12, f"in %; below the lines: the expert's number. A token goes to "
                 f"{numbers['active']} experts of each layer.", "soft")
    _, i, e = max((abs(one[i][e] - other[i][e]), i, e) for i in range(len(layers)) for e in range(E))
    return picture.svg("Experts of two prompts", (
        f"Qwen3-MoE-Tiny, {E} experts in each of {len(layers)} layers. Asked “{first}” and “{second}”, its experts "
        f"share the tokens differently, most of all layer {layers[i]}, expert {e}: {percent(one[i][e])} of the first's "
        f"and {percent(other[i][e])} of the second's."))


def draw_cache(numbers: dict) -> str:
    most, sizes = 131_072, numbers["bytes"]
    names = {"multi-head": "keys and values of all heads (MHA)", "grouped": "8 groups of heads (GQA)",
             "latent": "one latent for all heads (MLA)"}
    picture = Shaded(346)
    picture.text(24, 30, f"The cache by context, {numbers['layers']} layers in bfloat16, logarithmic scale", "head")
    low, high = min(sizes.values()) * 1024, max(sizes.values()) * most
    axes = Axes(picture, (74, 68, 380, 226), (0, most), (low, high), log=True)
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        _, y = axes.place(0, 10 ** power)
        picture.line([(74, y), (454, y)], "grid thin")
        picture.text(66, y + 4, of_bytes(10 ** power), "soft end")
    for x in (1024, 32_768, 65_536, most):
        at, _ = axes.place(x, low)
        picture.text(at, 314, f"{x:,}", "soft middle")
    ends = [axes.curve([(x, size * x) for x in range(1024, most + 1, 2032)], color)
            for size, color in zip(sizes.values(), "gba")]
    said = []
    for (name, size), color, y in zip(sizes.items(), "gba", apart([y for _, y in ends], 42)):
        picture.text(468, y, names[name], f"{color} label")
        picture.text(468, y + 17, f"{numbers['values'][name]:,} values a layer; {of_bytes(size * most)}", "soft")
        said.append(f"{names[name]}: {of_bytes(size)} a token, {of_bytes(size * 32_768)} at 32,768 tokens, "
                    f"{of_bytes(size * most)} at {most:,}")
    picture.text(74, 334, "tokens of context", "soft")
    return picture.svg("Bytes of the cache by context for MHA, GQA and MLA", (
        f"A model of DeepSeek-V3's shape with three kinds of cache. {'; '.join(said)}."))


def draw_drafting(numbers: dict) -> str:
    steps, row, first = numbers["steps"], 86, numbers["steps"][0]["first"] - 2
    size = min(62, 470 // (steps[-1]["first"] + 2 - first))  # of a slot; a mark follows the last
    picture = Shaded(86 + row * len(steps))
    picture.text(24, 30, "Drafting: what each step writes into the two caches", "head")
    picture.text(24, 52, "✓ the draft was kept; ✗ it was refused, and its slot is written again", "soft")
    said = []

    def slots(y: float, end: int) -> None:
        for slot in range(first, end):
            picture.cell(150 + size * (slot - first), y, size - 4, 24, 0.25, "g")

    for i, step in enumerate(steps):
        y, at, (begin, end) = 90 + row * i, step["first"], step["drafts"]
        picture.text(24, y + 17, f"step {i + 1}: the model", "soft")
        picture.text(24, y + 47, "the draft layer", "soft")
        slots(y, at)
        for slot, word, color in ((at, step["read"][0], "a"), (at + 1, step["read"][1], "c" if step["kept"] else "b")):
            x = 150 + size * (slot - first)
            picture.cell(x, y, size - 4, 24, TEXT_SHADE, color)
            picture.text(x + size / 2 - 2, y + 17, word.strip("·")[:6] or word, "mono middle")
            picture.text(x + size / 2 - 2, y - 6, f"slot {slot}", "soft middle")
        mark = "✓" if step["kept"] else f"✗ → {step['wrote'].strip('·')[:9]}"
        picture.text(158 + size * (at + 2 - first), y + 17, mark, f"{'c' if step['kept'] else 'b'} label")
        slots(y + 30, begin)
        for slot in range(begin, end):
            picture.cell(150 + size * (slot - first), y + 30, size - 4, 24, TEXT_SHADE, "a")
        said.append(f"step {i + 1} reads {step['read'][0]} and the draft {step['read'][1]} into the slots {at} and "
                    f"{at + 1}, and the draft layer has written its slots to {end - 1}; the draft is "
                    + ("kept" if step["kept"] else f"refused for {step['wrote']}"))
    return picture.svg("The caches of the model and of the draft layer over four steps", (
        f"DeepSeek-V3-Tiny at temperature {numbers['temperature']}: {'; '.join(said)}."))


def draw_mask(numbers: dict) -> str:
    size, top = 30, 96
    names = ["after a cache", *(f"row {i} of a batch" for i in range(len(numbers["batch"])))]
    panels = list(zip((90, 370, 560), names, [numbers["after"], *numbers["batch"]], [0, *numbers["padding"]]))
    picture = Shaded(top + size * 5 + 62)
    picture.text(24, 30, "Which slots each query sees", "head")
    for left, name, rows, pad in panels:
        picture.text(left, 62, name, "a label")
        first = len(rows[0]) - len(rows)
        for s in range(len(rows[0])):
            picture.text(left + size * (s + 0.5), top - 8, "·" if s < pad else str(s), "soft middle")
        for t, row in enumerate(rows):
            picture.text(left - 8, top + size * t + 20, "·" if first + t < pad else str(first + t), "soft end")
            for s, sees in enumerate(row):
                x, y = left + size * s, top + size * t
                picture.cell(x + 1, y + 1, size - 2, size - 2, 0.8 if sees else 0.12,
                             ("b" if s < pad else "a") if sees else "g")
    foot = picture.height - 34
    picture.text(24, foot, "a row for each token read, a column for each slot; full: it sees it", "soft")
    picture.text(24, foot + 18, "· is padding, which no token of a text sees; it sees itself, since a softmax over "
                 "nothing is NaN", "soft")
    return picture.svg("The attention mask with a cache and with padding", (
        f"Left: {len(numbers['after'])} tokens read after {numbers['cached']} that the cache holds; each sees those "
        "and what was read so far. Right: two prompts of one batch; the second begins after "
        f"{numbers['padding'][1]} slots of padding, which none of its tokens sees."))


DRAW = {"attention": draw_attention, "lens": draw_lens, "clocks": draw_clocks, "yarn": draw_yarn,
        "experts": draw_experts, "cache": draw_cache, "drafting": draw_drafting, "mask": draw_mask}
