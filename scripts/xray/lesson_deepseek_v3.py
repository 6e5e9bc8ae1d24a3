"""Numbers -> SVG: the pictures that only DeepSeek-V3's lesson shows. measure_deepseek_v3.py has the numbers."""

import math

from ..train.draw import Axes
from .drawings import TEXT_SHADE, Shaded, percent


NAMES = {"begin▁of▁sentence": "BOS"}  # of special tokens, without their brackets


def short(token: str) -> str:
    """A token as it fits under a bar."""
    inside = token.strip("<｜>")
    return NAMES.get(inside, inside) if "｜" in token else token


def box(picture: Shaded, x: float, y: float, width: float, height: float, kind: str, *lines: str) -> None:
    """A shaded box with centered lines of text."""
    picture.cell(x, y, width, height, 0.28, kind)
    for i, line in enumerate(lines):
        picture.text(x + width / 2, y + height / 2 + 5 + 16 * (i - (len(lines) - 1) / 2), line, "middle")


def arrow(picture: Shaded, x0: float, y0: float, x1: float, y1: float, kind: str) -> None:
    picture.line([(x0, y0), (x1, y1)], kind)
    angle = math.atan2(y1 - y0, x1 - x0)
    picture.line([(x1 + 9 * math.cos(angle + turn), y1 + 9 * math.sin(angle + turn)) if turn else (x1, y1)
                  for turn in (math.pi - 0.45, 0, math.pi + 0.45)], kind)


def draw_absorption(numbers: dict) -> str:
    H, R, N, M = (numbers[name] for name in ("heads", "latent", "key", "value"))
    picture = Shaded(404)
    picture.text(24, 30, "One score, computed in two orders", "head")
    for left, name, kind in ((24, "expanded", "b"), (384, "absorbed", "a")):
        picture.text(left, 58, f"{name}:", f"{kind} label")
        box(picture, left, 74, 312, 34, "g", f"query without position: {H} heads × {N}")
        for row in range(3):
            picture.cell(left, 298 + 18 * row, 312, 15, 0.28, "c")
        picture.text(left + 156, 310, f"token 0 in the cache: {R} values", "soft middle")
        picture.text(left + 156, 328, f"token 1: {R} values", "soft middle")
        picture.text(left + 156, 346, "…", "soft middle")
    picture.text(106, 58, "the matrices stand at the cache")
    picture.text(466, 58, "the matrices stand at the query")
    box(picture, 24, 166, 312, 50, "b", f"keys {H} × {N} and values {H} × {M}",
        f"= {numbers['rebuilt']:,} for each token")
    arrow(picture, 100, 294, 100, 222, "b")
    picture.text(114, 250, "times W_UK and W_UV,", "b label")
    picture.text(114, 267, "for every token in the cache", "b label")
    arrow(picture, 100, 112, 100, 160, "g")
    picture.text(114, 140, "scores, and the sum of values", "soft")
    box(picture, 384, 166, 312, 50, "a", f"{H} heads × {R}: the query as a", "question about latents")
    arrow(picture, 460, 112, 460, 160, "a")
    picture.text(474, 132, "times W_UKᵀ, once;", "a label")
    picture.text(474, 149, "back by W_UV, once", "a label")
    arrow(picture, 460, 220, 460, 292, "g")
    picture.text(474, 250, "scores, and the sum of latents,", "soft")
    picture.text(474, 267, "on what is stored", "soft")
    picture.text(24, 376, "The result is the same; only the order of the matmuls has changed. In both, the rotary part",
                 "soft")
    picture.text(24, 393, f"of each score is added, from {numbers['rope']} values more for each token.", "soft")
    return picture.svg("Expanded and absorbed latent attention", (
        f"Left: the latents of {R} values are multiplied by W_UK and W_UV for every token in the cache, which gives "
        f"{numbers['rebuilt']:,} values for each. Right: the query of {H} heads is multiplied by W_UK transposed once "
        "and meets the latents themselves; the weighted sum of latents is multiplied by W_UV once."))


def draw_rope_breaks(numbers: dict) -> str:
    tokens, true, folded = numbers["tokens"], numbers["true"], numbers["folded"]
    picture = Shaded(296)
    picture.text(24, 30, "If RoPE turned all of a key: scores of the last token", "head")
    picture.text(24, 54, "with every key rotated", "a label")
    picture.text(200, 54, "with one folded query for all of them", "b label")
    low, high = min(true + folded), max(true + folded)
    axes = Axes(picture, (64, 76, 632, 150), (0, len(tokens)), (low, high))
    _, zero = axes.place(0, 0)
    for y in (low, 0, high):
        _, at = axes.place(0, y)
        picture.text(56, at + 4, f"{y:.2f}" if y else "0", "soft end")
    picture.line([(64, zero), (696, zero)], "axis thin")
    for i, token in enumerate(tokens):
        for score, kind, shift in ((true[i], "a", 0.2), (folded[i], "b", 0.5)):
            x, y = axes.place(i + shift, score)
            picture.bar(x, min(y, zero), 22, max(abs(y - zero), 1), kind)
        x, _ = axes.place(i + 0.5, 0)
        picture.text(x, 248, short(token), "mono middle")
    picture.text(24, 274, f"layer {numbers['layer']}, head {numbers['head']} of the small model; only at the last "
                 "token, where both stand at one place, do they agree", "soft")
    pairs = "; ".join(f"{short(token)} {a:.2f} and {b:.2f}" for token, a, b in zip(tokens, true, folded))
    return picture.svg("Rotated keys cannot be absorbed", (
        "Scores of the last token of “What is RoPE?” with all of each key rotated, and with one folded query: "
        f"{pairs}. They agree at the last token only."))


def draw_forms(numbers: dict) -> str:
    news, expanded, absorbed = numbers["news"], numbers["expanded"], numbers["absorbed"]
    picture = Shaded(330)
    picture.text(24, 30, f"Multiplications in one layer, after {numbers['cached']:,} tokens in the cache", "head")
    axes = Axes(picture, (84, 62, 430, 206), (0, len(news) - 1), (min(absorbed), max(absorbed)), log=True)
    for value in (1, 10, 100, 1000):
        _, at = axes.place(0, value)
        picture.line([(84, at), (514, at)], "grid thin")
        picture.text(76, at + 4, f"{value:,} G", "soft end")
    ends = [axes.curve(list(enumerate(values)), kind) for values, kind in ((expanded, "b"), (absorbed, "a"))]
    for i, new in list(enumerate(news))[::2]:
        at, _ = axes.place(i, 1)
        picture.text(at, 288, f"{new:,}", "soft middle")
    at, _ = axes.place(math.log2(numbers["last"]), 1)
    picture.line([(at, 62), (at, 268)], "axis thin dash")
    picture.text(at - 8, 76, f"up to {numbers['last']}: absorbed", "end a label")
    for (_, y), name, shift in zip(ends, ("expanded", "absorbed"), (6, 6)):
        picture.text(522, y + shift, name, f"{'b' if name == 'expanded' else 'a'} label")
    picture.text(522, 200, f"one token: {expanded[0]:.1f} G", "b label")
    picture.text(522, 218, f"against {absorbed[0]:.2f} G", "a label")
    picture.text(84, 312, "new tokens that are read together; both axes are logarithmic", "soft")
    return picture.svg("Cost of the two forms by the number of new tokens", (
        f"After {numbers['cached']:,} cached tokens in a layer of DeepSeek-V3's shape. One new token: "
        f"{expanded[0]:.1f} billion multiplications expanded, {absorbed[0]:.2f} absorbed. Up to {numbers['last']} new "
        f"tokens the absorbed form is cheaper; for {news[-1]:,} it takes {absorbed[-1] / expanded[-1]:.1f} times as "
        "many."))


def draw_bias_and_groups(numbers: dict) -> str:
    scores, bias, chosen = numbers["scores"], numbers["bias"], numbers["chosen"]
    E, size = len(scores), len(scores) // numbers["groups"]
    choice = [s + b for s, b in zip(scores, bias)]
    worth = [sum(sorted(choice[g * size:(g + 1) * size])[-2:]) for g in range(numbers["groups"])]
    best = sorted(range(len(worth)), key=lambda g: -worth[g])[:numbers["best"]]
    picture = Shaded(390)
    picture.text(24, 30, f"One choice of the router: token {numbers['token']}, layer {numbers['layer']}", "head")
    picture.text(24, 54, "score", "a label")
    picture.text(70, 54, "the bias, added or taken away", "b label")
    picture.text(290, 54, "framed: the two best groups", "c label")
    floor, scale, width = 236, 250, 656 / E
    for e in range(E):
        x = 36 + width * e
        picture.bar(x, floor - scale * scores[e], 36, scale * scores[e], "a")
        top = floor - scale * max(choice[e], scores[e])
        picture.cell(x + 36, top if bias[e] > 0 else floor - scale * scores[e], 10, scale * abs(bias[e]), 0.9, "b")
        picture.text(x + 24, floor - scale * max(choice[e], scores[e], 0) - 8, f"{choice[e]:.2f}", "middle")
        picture.text(x + 24, floor + 26, f"expert {e}", "soft middle")
        if e in chosen:
            picture.text(x + 24, floor + 84, "chosen", "middle c label")
            picture.text(x + 24, floor + 102, f"weight {numbers['weights'][chosen.index(e)]:.2f}", "middle")
    picture.line([(28, floor), (692, floor)], "axis thin")
    for g, value in enumerate(worth):
        x = 36 + width * size * g
        picture.text(x + width * size / 2 - 16, floor + 52, f"group {g}: {value:.2f}", "middle")
        if g in best:
            picture.frame(x - 8, 74, width * size - 10, 220, "c")
    without = " and ".join(str(e) for e in sorted(set(numbers["without_bias"]) - set(chosen)))
    with_it = " and ".join(str(e) for e in sorted(set(chosen) - set(numbers["without_bias"])))
    outside = max((choice[e], e) for e in range(E) if e // size not in best)
    picture.text(24, 360, f"Without the bias, experts {without} would be chosen instead of {with_it}.", "soft")
    picture.text(24, 377, f"Expert {outside[1]} has a higher number than expert {chosen[-1]}, "
                 "and is out with its group.", "soft")
    told = "; ".join(f"expert {e} {scores[e]:.2f}, bias {bias[e]:+.2f}" for e in range(E))
    return picture.svg("How the router chooses three of eight experts", (
        f"Scores of the token {numbers['token']} in layer {numbers['layer']} of the small model: {told}. Groups by "
        f"their two best: {', '.join(f'{value:.2f}' for value in worth)}. Chosen are experts "
        f"{', '.join(map(str, chosen))}; without the bias {', '.join(map(str, numbers['without_bias']))}."))


def draw_mtp(numbers: dict) -> str:
    width, left, height = 96, 132, 30
    picture = Shaded(288)
    picture.text(24, 30, "Two predictions from each place: the next token, and the one after it", "head")
    rows = (("it reads", numbers["reads"], None, 66), ("the model: next", None, numbers["next"], 112),
            ("then came", numbers["then"], None, 158), ("draft layer: after it", None, numbers["second"], 204))
    for name, plain, cells, y in rows:
        picture.text(left - 10, y + 20, name, "soft end")
        for i in range(len(numbers["reads"])):
            x = left + width * i
            if cells:
                word, chance = cells[i]
                right = word == (numbers["then"], numbers["after"])[y > 150][i]
                picture.cell(x + 2, y, width - 6, height, TEXT_SHADE * chance, "a" if y < 150 else "c")
                picture.text(x + width / 2 - 1, y + 20, word, "mono middle")
                if not right:
                    picture.frame(x + 2, y, width - 6, height, "b")
            else:
                picture.text(x + width / 2, y + 20, plain[i], "mono middle")
    for i in range(len(numbers["reads"])):
        x = left + width * (i + 0.5)
        arrow(picture, x, 190, x, 202, "g thin")
        picture.line([(x - 34, 142), (x - 34, 198)], "g thin")
    picture.text(24, 262, "The draft layer gets the model's state (line at the left of each column) and the token "
                 "that came (arrow).", "soft")
    least = min(chance for _, chance in numbers["next"] + numbers["second"])
    picture.text(24, 278, f"All of these predictions came true; the least sure had a chance of "
                 f"{percent(least)}.", "soft")
    told = "; ".join(f"after {read} the model says {a[0]}, and with {then} the draft layer {b[0]} ({percent(b[1])})"
                     for read, then, a, b in zip(*(numbers[name] for name in ("reads", "then", "next", "second"))))
    return picture.svg("The model and its draft layer predict two tokens from each place", (
        f"DeepSeek-V3-Tiny, asked “{numbers['question']}”: {told}."))


def draw_acceptance(numbers: dict) -> str:
    p, q, names = numbers["p"], numbers["q"], "ABC"
    picture = Shaded(300)
    picture.text(24, 30, "A refused draft leaves the distribution of the text as it was", "head")
    floor, scale = 226, 260
    for left, head, kind in ((36, "what the draft offers: q", "b"), (276, "kept: the smaller of p and q", "c"),
                             (516, "refilled up to p", "a")):
        picture.text(left - 12, 60, head, f"{kind} label")
        picture.line([(left - 12, floor), (left + 180, floor)], "axis thin")
        for i, name in enumerate(names):
            picture.text(left + 60 * i + 20, floor + 18, name, "middle")
    for i in range(3):
        kept = min(p[i], q[i])
        for left, parts in ((36, [(q[i], "b")]), (276, [(kept, "c")]), (516, [(kept, "c"), (p[i] - kept, "a")])):
            y = floor
            for share, kind in parts:
                picture.bar(left + 60 * i, y - scale * share, 40, scale * share, kind)
                y -= scale * share
            picture.text(left + 60 * i + 20, y - 6, f"{sum(share for share, _ in parts):.1f}", "middle")
        x = 276 + 60 * i
        picture.line([(x - 6, floor - scale * p[i]), (x + 46, floor - scale * p[i])], "axis dash")
    picture.text(24, 270, "dashed: p, what the model wants. B is offered too often, and is refused sometimes; A gets "
                 "what is refused.", "soft")
    drawn = ", ".join(f"{share:.3f}" for share in numbers["drawn"])
    picture.text(24, 288, f"{numbers['count']:,} drafts through the package's verify gave {drawn}.", "soft")
    return picture.svg("Exact acceptance of drafts", (
        f"q is {q}, p is {p}. Kept are the smaller of both, {[min(a, b) for a, b in zip(p, q)]}; the refused share "
        f"goes to A alone, where p is larger than q. {numbers['count']:,} drafts gave {drawn}."))


def draw_fp8(numbers: dict) -> str:
    times, matrix, block = numbers["times"], numbers["matrix"], numbers["block"]
    picture = Shaded(312)
    picture.text(24, 30, "One weight grows: what that does to all others in FP8", "head")
    picture.text(24, 52, "their error, as a share of their size (both axes are logarithmic)", "soft")
    axes = Axes(picture, (84, 70, 400, 178), (0, len(times) - 1), (0.02, max(matrix)), log=True)
    for value in (0.02, 0.05, 0.1, 0.2, 0.5):
        _, at = axes.place(0, value)
        picture.line([(84, at), (484, at)], "grid thin")
        picture.text(76, at + 4, f"{100 * value:.0f} %", "soft end")
    size, side = numbers["size"], numbers["side"]
    for values, kind, lines in ((matrix, "b", (f"one scale for all {size} × {size}:", f"{100 * matrix[-1]:.0f} %")),
                                (block, "a", (f"a scale for each {side} × {side}:", f"{100 * block[-1]:.0f} %"))):
        _, y = axes.curve(list(enumerate(values)), kind)
        for i, line in enumerate(lines):
            picture.text(494, y + 6 + 17 * i, line, f"{kind} label")
    for i, factor in enumerate(times):
        at, _ = axes.place(i, 1)
        picture.text(at, 268, f"{factor:,}", "soft middle")
    picture.text(84, 292, "how many times as large one weight is as the largest others are", "soft")
    return picture.svg("The error of FP8 weights beside one large weight", (
        f"A random matrix of {size} × {size}. With one scale the error of the other weights is {100 * matrix[0]:.1f} % "
        f"and rises to {100 * matrix[-1]:.0f} % when one weight is {times[-1]:,} times as large; with a scale for each "
        f"block it rises to {100 * block[-1]:.0f} %, since only one block of sixteen suffers."))


DRAW = {"absorption": draw_absorption, "rope_breaks": draw_rope_breaks, "forms": draw_forms,
        "bias_and_groups": draw_bias_and_groups, "mtp": draw_mtp, "acceptance": draw_acceptance, "fp8": draw_fp8}
