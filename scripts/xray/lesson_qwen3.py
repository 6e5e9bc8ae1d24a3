"""Numbers -> SVG: the pictures of qwen3/README.md that follow its one question through the model."""

import math

from ..train.draw import Axes
from .drawings import TEXT_SHADE, Shaded, percent


def turned(x: float, y: float, words: str, kind: str = "mono") -> str:
    """A text that goes up, for labels below narrow columns."""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text transform="translate({x:.1f} {y:.1f}) rotate(-60)" class="{kind} end">{escaped}</text>'


def draw_overview(numbers: dict) -> str:
    T, D, H, K, N, F, V = (numbers[letter] for letter in "TDHKNFV")
    picture, spine, left = Shaded(474), 90, 190
    picture.text(24, 30, f"“{numbers['question']}” on its way through Qwen3-Tiny", "head")
    picture.text(628, 58, "shape", "soft middle")
    picture.line([(spine, 96), (spine, 411), (left, 411)], "b")

    def row(y: float, words: str, shape: str, kind: str) -> None:
        picture.cell(left, y, 330, 30, 0.22, kind)
        picture.text(left + 165, y + 20, words, "middle")
        picture.text(628, y + 20, shape, "mono middle")

    def branch(y: float, rows: list[tuple[str, str, str]], name: str) -> None:
        """What is read from the stream, goes through `rows`, and is added to it."""
        end = y + 36 * len(rows) - 6
        picture.line([(spine, y + 15), (left, y + 15)], "g")
        for i, each in enumerate(rows):
            row(y + 36 * i, *each)
        picture.line([(left, end - 15), (spine + 9, end - 15)], "g")
        picture.ring(spine, end - 15, 9)
        picture.text(spine, end - 10.5, "+", "middle b label")
        picture.text(24, (y + end) / 2 + 4, name, "soft")

    row(66, "embed_tokens: a row of the table for each id", f"({T}, {D})", "c")
    picture.line([(left, 81), (spine, 81), (spine, 100)], "b")
    picture.text(24, 70, f"{T} ids", "soft")
    branch(118, [("RMSNorm", f"({T}, {D})", "g"),
                 ("queries, keys, values; norm and RoPE", f"({H} + 2·{K}, {T}, {N})", "a"),
                 ("weights, then sums of values", f"({H}, {T}, {T})", "a"), ("o_proj", f"({T}, {D})", "a")], "")
    branch(276, [("RMSNorm", f"({T}, {D})", "g"), ("silu(gate_proj) · up_proj", f"({T}, {F})", "a"),
                 ("down_proj", f"({T}, {D})", "a")], "")
    picture.line([(530, 118), (538, 118), (538, 378), (530, 378)], "axis thin")
    picture.text(24, 258, f"{numbers['L']} ×", "label b")
    row(396, "RMSNorm, then lm_head", f"({T}, {V})", "c")
    picture.text(24, 454, f"orange: the residual stream, a vector of {D} numbers for each token. The last row of the "
                 f"{T} gives “{numbers['next']}”.", "soft")
    return picture.svg("All parts of Qwen3 and the shapes between them", (
        f"{T} token ids become {T} vectors of {D} numbers, the residual stream. Each of {numbers['L']} layers adds to "
        f"it twice. Attention: RMSNorm, {H} heads of queries and {K} of keys and values, {N} numbers each, weights of "
        f"shape ({H}, {T}, {T}), o_proj. MLP: RMSNorm, {F} gated numbers, down_proj. At the end RMSNorm and lm_head "
        f"give {V} logits for each token; the last row's best is {numbers['next']}."))


def draw_spelling(numbers: dict) -> str:
    size, left, picture = 50, 116, Shaded(262)
    picture.text(24, 30, "From a text to ids: characters, bytes, spelled bytes, tokens", "head")
    for y, name in ((76, "character"), (118, "byte"), (160, "in the file"), (204, "token")):
        picture.text(left - 14, y, name, "soft end")

    def spans(y: float, height: float, widths: list[int], kind: str) -> list[float]:
        middles, at = [], 0
        for width in widths:
            picture.cell(left + size * at + 2, y, size * width - 4, height, 0.2, kind)
            middles.append(left + size * (at + width / 2))
            at += width
        return middles

    characters, tokens = numbers["characters"], numbers["tokens"]
    for x, (character, _) in zip(spans(56, 32, [len(own) for _, own in characters], "b"), characters):
        picture.text(x, 77, "space" if character == " " else character, "middle")
    every = [byte for _, own in characters for byte in own]
    for i, (byte, character) in enumerate(zip(every, numbers["spelled"])):
        picture.text(left + size * (i + 0.5), 118, f"{byte:02X}", "mono middle")
        picture.text(left + size * (i + 0.5), 160, character, "middle")
    for x, (id, _) in zip(spans(184, 32, [count for _, count in tokens], "a"), tokens):
        picture.text(x, 205, str(id), "mono middle")
    picture.text(24, 244, "Qwen3-Tiny has seen “ve” so often that it is one token; a smile costs it four.", "soft")
    return picture.svg("The bytes and the tokens of one text", (
        f"The text “{numbers['text']}” has {len(characters)} characters and {len(every)} bytes, "
        f"{' '.join(f'{byte:02X}' for byte in every)}. The vocabulary's file spells them "
        f"{''.join(numbers['spelled'])}. Qwen3-Tiny makes {len(tokens)} tokens of them: "
        f"{', '.join(str(id) for id, _ in tokens)}."))


def draw_lengths(numbers: dict) -> str:
    lengths, tokens = numbers["lengths"], numbers["tokens"]
    asked, last = tokens.index("·RoPE"), len(tokens) - 1
    picture, top = Shaded(330), max(map(max, lengths))
    picture.text(24, 30, "The length of each token's vector, after the embedding and after each layer", "head")
    axes = Axes(picture, (70, 60, 440, 210), (0, len(lengths) - 1), (0, 50 * math.ceil(top / 50)))
    for y in range(0, 50 * math.ceil(top / 50) + 1, 100):
        _, at = axes.place(0, y)
        picture.line([(70, at), (510, at)], "grid thin")
        picture.text(60, at + 4, str(y), "soft end")
    for depth in range(len(lengths)):
        x, _ = axes.place(depth, 0)
        picture.text(x, 290, f"layer {depth - 1}" if depth else "embedding", "soft middle")
    for j in sorted(range(len(tokens)), key=lambda j: j in (asked, last)):
        kind = {asked: "a", last: "b"}.get(j, "g thin")
        _, y = axes.curve([(depth, row[j]) for depth, row in enumerate(lengths)], kind)
        if j in (asked, last):
            name = "RoPE" if j == asked else "the last token"
            picture.text(522, y + 4, f"{name}: {lengths[-1][j]:.0f}", f"{kind} label")
    picture.text(24, 316, f"gray: the other {len(tokens) - 2} tokens of the prompt", "soft")
    row = ", ".join(f"{each[last]:.1f}" for each in lengths)
    return picture.svg("The lengths of the residual stream's vectors", (
        f"Qwen3-Tiny reads {len(tokens)} tokens. The vector of the last one has the lengths {row}; that of RoPE "
        f"{', '.join(f'{each[asked]:.1f}' for each in lengths)}. All begin near {lengths[0][last]:.0f} and grow."))


def draw_looks(numbers: dict) -> str:
    scores, weights, tokens = numbers["scores"], numbers["weights"], numbers["tokens"]
    size, left, low = 42, 36, math.floor(min(scores)) - 1
    picture = Shaded(404)
    picture.text(24, 30, f"Layer {numbers['head'][0]}, head {numbers['head'][1]}: the last token looks back", "head")
    for title, values, floor, height, kind, base, top in (
            ("its scores", scores, 150, 70, "g", low, max(scores)),
            ("after the softmax, in %", [100 * w for w in weights], 290, 84, "a", 0, 100)):
        picture.text(24, floor - height - 18, title, "soft")
        picture.line([(left - 6, floor), (left + size * len(tokens), floor)], "axis thin")
        for j, value in enumerate(values):
            tall = max(1, height * (value - base) / (top - base))
            picture.bar(left + size * j + 4, floor - tall, size - 12, tall, kind)
            words = f"{value:.1f}" if kind == "g" or value < 10 else f"{value:.0f}"
            picture.text(left + size * j + size / 2 - 2, floor - tall - 5, words, "soft middle")
    for j, token in enumerate(tokens):
        picture.parts.append(turned(left + size * j + size / 2 + 4, 304, token))
    said = "; ".join(f"{token} score {score:.2f}, weight {weight:.4f}"
                     for token, score, weight in zip(tokens, scores, weights))
    return picture.svg("The scores and weights of one head at the end of the prompt", (
        f"Qwen3-Tiny has read the question; the query of the last token is compared with the key of each: {said}."))


def draw_pairs(numbers: dict) -> str:
    products, rounds = numbers["products"], numbers["rounds"]
    size, left, floor = 40, 56, 200
    picture, total = Shaded(280), sum(products)
    picture.text(24, 30, f"What each pair adds to the score for RoPE, {numbers['apart']} tokens back", "head")
    picture.text(24, 52, f"sum {total:.1f}, divided by √{numbers['N']}: {total / numbers['N'] ** 0.5:.2f}", "soft")
    picture.line([(left - 8, floor), (left + size * len(products), floor)], "axis thin")
    for j, (value, turn) in enumerate(zip(products, rounds)):
        tall, x = 110 * abs(value) / max(products), left + size * j
        picture.bar(x + 4, floor - tall if value > 0 else floor, size - 12, max(tall, 1), "b" if j < 4 else "a")
        picture.text(x + size / 2 - 2, floor - tall - 6, f"{round(value, 1) + 0.0:.1f}", "soft middle")
        picture.text(x + size / 2 - 2, floor + 20, str(j), "soft middle")
        once = f"{turn:,.0f}" if turn < 10_000 else f"{turn / 1000:.0f}k"
        picture.text(x + size / 2 - 2, floor + 38, once, "soft middle")
    picture.text(left - 12, floor + 20, "pair", "soft end")
    picture.text(24, 264, "below the pair: after how many tokens it is round once. Orange: fast pairs, blue: slow ones",
                 "soft")
    return picture.svg("The contributions of the pairs of one head to a score", (
        f"Layer {numbers['head'][0]}, head {numbers['head'][1]} of Qwen3-Tiny, query of the last token, key of RoPE. "
        + "; ".join(f"pair {j} (round in {turn:,.0f} tokens) adds {value:.2f}"
                    for j, (value, turn) in enumerate(zip(products, rounds)))
        + f". The four fast pairs add {sum(products[:4]):.1f} of {total:.1f}."))


def draw_gates(numbers: dict) -> str:
    columns, size, top = 32, 10, 76
    picture = Shaded(top + size * math.ceil(len(numbers["gates"][0]) / columns) + 60)
    picture.text(24, 30, f"The {len(numbers['gates'][0])} gates of layer 0 for two tokens", "head")
    most = max(map(max, numbers["gates"]))
    for left, word, gates, count, kind in zip((24, 374), numbers["words"], numbers["gates"], numbers["open"], "ab"):
        picture.text(left, 62, f"{word.strip('·')}: {count} gates above 1", f"{kind} label")
        picture.cell(left, top, size * columns, size * math.ceil(len(gates) / columns), 0.08, kind)
        for i, gate in enumerate(gates):
            if gate > 0.25:
                x, y = left + size * (i % columns), top + size * (i // columns)
                picture.cell(x + 0.5, y + 0.5, size - 1, size - 1, min(1, gate / min(most, 2.5)), kind)
    picture.text(24, picture.height - 34, f"a square is one of {len(numbers['gates'][0])} neurons, full where its gate "
                 f"lets much through; {numbers['both']} are above 1 for both", "soft")
    picture.text(24, picture.height - 16, "so each token gets an MLP of its own, made of few of the neurons", "soft")
    return picture.svg("Open and shut gates of one MLP", (
        f"silu(gate_proj(x)) in layer 0 of Qwen3-Tiny. For {numbers['words'][0].strip('·')} {numbers['open'][0]} of "
        f"{len(numbers['gates'][0])} gates are above 1, for {numbers['words'][1]} {numbers['open'][1]}, for both "
        f"{numbers['both']}."))


def draw_heat(numbers: dict) -> str:
    picture, width = Shaded(276), 216
    picture.text(24, 30, "The first token of the answer at three temperatures", "head")
    said = []
    for i, at in enumerate(numbers["at"]):
        left, rest = 24 + 232 * i, 1 - sum(at["chances"])
        picture.text(left, 60, f"temperature {at['temperature']:g}", "a label")
        names = [*at["tokens"], f"the other {numbers['V'] - len(at['tokens']):,}"]
        for row, (token, chance) in enumerate(zip(names, [*at["chances"], rest])):
            y, last = 74 + 20 * row, row == len(names) - 1
            picture.cell(left, y, max(1, width * chance), 16, TEXT_SHADE, "b" if last else "a")
            picture.text(left + 4, y + 12, token, "mono")
            picture.text(left + width, y + 12, percent(chance) if chance > 1e-6 else "0 %", "end")
        picture.text(left, 236, f"top-p 0.9 keeps {at['top_p']}", "soft")
        said.append(f"at temperature {at['temperature']:g} {at['tokens'][0]} has {percent(at['chances'][0])}, the six "
                    f"likeliest {percent(sum(at['chances']))}, and top-p 0.9 keeps {at['top_p']} tokens")
    picture.text(24, 262, "orange: all other tokens together; each is unlikely, together they spoil the text", "soft")
    return picture.svg("Probabilities of the first token at three temperatures", f"Qwen3-Tiny: {'; '.join(said)}.")


def draw_growing(numbers: dict) -> str:
    without, cached = numbers["without"], numbers["with"]
    size, floor, picture = 28, 196, Shaded(262)
    picture.text(24, 30, "Tokens that go through the layers at each step of one answer", "head")
    for (name, values, kind), x in zip((("without a cache", without, "g"), ("with it", cached, "a")), (24, 360)):
        picture.text(x, 56, f"{name}: {sum(values)} in all", f"{kind} label")
    picture.line([(46, floor), (46 + size * len(without), floor)], "axis thin")
    for i, (more, few) in enumerate(zip(without, cached)):
        for value, kind, shift in ((more, "g", 3), (few, "a", 14)):
            picture.bar(46 + size * i + shift, floor - 3.2 * value, 10, 3.2 * value, kind)
        picture.text(46 + size * (i + 0.5), floor + 18, str(i + 1), "soft middle")
    picture.text(40, floor + 18, "step", "soft end")
    picture.text(24, 246, f"step 1 is the prefill of {numbers['prompt']} tokens; every later step decodes one", "soft")
    return picture.svg("Work with and without a KV cache", (
        f"A prompt of {numbers['prompt']} tokens and {len(without)} steps. Without a cache all tokens go through the "
        f"layers at every step, {without[0]} to {without[-1]}, {sum(without)} in all; with it {cached[0]} and then "
        f"one, {sum(cached)} in all."))


DRAW = {"overview": draw_overview, "spelling": draw_spelling, "lengths": draw_lengths, "looks": draw_looks,
        "pairs": draw_pairs, "gates": draw_gates, "heat": draw_heat, "growing": draw_growing}
