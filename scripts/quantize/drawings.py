"""Numbers -> SVG: the pictures of this folder's page, drawn with the means of the training lesson's."""

from collections.abc import Callable, Sequence

from ..train.draw import Axes, Picture, apart

NAMES = {"qwen3": "Qwen3-Tiny", "qwen3_moe": "Qwen3-MoE-Tiny", "deepseek_v3": "DeepSeek-V3-Tiny"}
COLORS = {"3": "b", "4": "a", "5": "c", "6": "g", "8": "g"}


def frame(axes: Axes, xs: Sequence[tuple[float, str]], ys: Sequence[float], name: Callable[[float], str]) -> None:
    """Both axes with labels: (place, words) below, and the names of the values at the left."""
    right, bottom, picture = axes.left + axes.width, axes.top + axes.height, axes.picture
    for y in ys:
        _, at = axes.place(axes.xs[0], y)
        picture.line([(axes.left, at), (right, at)], "grid thin")
        picture.text(axes.left - 8, at + 4, name(y), "soft end")
    picture.line([(axes.left, bottom), (right, bottom)], "axis thin")
    for x, words in xs:
        at, _ = axes.place(x, ys[0])
        picture.text(at, bottom + 18, words, "soft middle")


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def draw_outlier(numbers: dict) -> str:
    picture, left, unit, said = Picture(220), 140, 146, []
    picture.text(24, 30, "One large weight makes the steps coarse for all that share its scale", "head")
    for height, color, words, (name, found) in zip((88, 168), "ab", (
            "", "the same seven, and 3.5"), numbers.items()):
        weights, scale, small = found["weights"], found["scale"], found["weights"][:-1]
        place = lambda value: left + unit * value  # noqa: E731
        levels = [scale * q for q in range(-8, 8) if -0.8 <= scale * q]
        picture.line([(place(levels[0]), height), (place(levels[-1]), height)], "axis thin")
        for level in levels:
            picture.line([(place(level), height - 4), (place(level), height + 4)], "axis")
        for level in levels if scale > 0.3 else levels[1::7]:
            picture.text(place(level), height + 20, f"{level:.1f}".replace("-", "−"), "soft middle")
        for weight, q in zip(weights, found["q"]):
            picture.line([(place(weight), height - 22), (place(scale * q), height)], f"{color} thin")
            picture.dot(place(weight), height - 22, color)
        x = place(0.95)
        picture.text(x, height - 28 if words else height - 14, f"scale {scale:g}" + (f": {words}" if words else
                     ": eight weights, and the 16 values that four bits have"), f"{color} label")
        picture.text(x, height - 12 if words else height + 4, f"error of the seven: {found['error']:.3f}", "soft")
        said.append(f"With the largest weight {max(map(abs, weights)):g} the scale is {scale:g}, the integers are "
                    f"{', '.join(map(str, found['q']))}, and the root mean square error of the seven weights "
                    f"{', '.join(map(str, small))} is {found['error']:.3f}.")
    return picture.svg("Eight weights in four bits, without and with a large one", " ".join(said))


def draw_errors(numbers: dict) -> str:
    groups, table, picture = numbers["groups"], numbers["errors"], Picture(350)
    picture.text(24, 30, "What rounding changes in the matrices of Qwen3-Tiny, relative to their size", "head")
    y, ticks = (0.0035, 0.65), (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    names = {"row": "a row", "matrix": "all"}
    by_group = Axes(picture, (64, 76, 250, 216), (-0.3, len(groups) - 0.7), y, log=True)
    frame(by_group, [(i, names.get(group, str(group))) for i, group in enumerate(groups)], ticks, percent)
    by_bits = Axes(picture, (430, 76, 250, 216), (3, 10.2), y, log=True)
    frame(by_bits, [(bits, str(bits)) for bits in range(3, 11)], ticks, percent)
    picture.text(64, 60, "by weights that share a scale")
    picture.text(430, 60, "by bits stored, scales included")
    said = []
    for bits, points in table.items():
        color = COLORS[bits]
        for axes, places in ((by_group, range(len(groups))), (by_bits, [stored for _, stored in points])):
            ends = [(x, error) for x, (error, _) in zip(places, points)]
            axes.curve(ends, color)
            for x, error in ends:
                picture.dot(*axes.place(x, error), color)
        x, height = by_group.place(len(groups) - 1, points[-1][0])
        picture.text(x + 12, height + 4, f"{bits} bits", f"{color} label")
        each = ", ".join(f"{100 * error:.1f} % ({names.get(group, group)}, {stored:.2f} bits)"
                         for group, (error, stored) in zip(groups, points))
        said.append(f"{bits} bits: {each}")
    picture.text(24, 334, "Both show the same points. Small groups are at the left of the left picture, "
                 "and at the right ends of the right one.", "soft")
    return picture.svg("Rounding error by group and by bits", (
        "Root mean square of the change of all matrices that are rounded, relative to that of the matrices, by the "
        f"number of weights that share a scale, and with the bits that are stored. {'. '.join(said)}."))


def draw_answers(numbers: dict) -> str:
    picture, said, numbers = Picture(320), [], numbers["models"]
    picture.text(24, 30, "What the embedded models lose, by bits of a weight, in groups of 32", "head")
    asked = [bits for bits, line in numbers["qwen3"].items() if len(line) > 1][::-1]
    left = Axes(picture, (64, 76, 190, 186), (-0.2, len(asked) - 0.8), (0, 1))
    frame(left, [(i, bits) for i, bits in enumerate(asked)], (0, 0.25, 0.5, 0.75, 1), percent)
    picture.text(64, 60, "right answers, all three models")
    kinds, ends = {"sums": "a", "glossary": "b", "own words": "c"}, []
    for kind, color in kinds.items():
        shares = [sum(lines[bits][kind] for lines in numbers.values()) / len(numbers) for bits in asked]
        ends.append(left.curve(list(enumerate(shares)), color))
        for i, share in enumerate(shares):
            picture.dot(*left.place(i, share), color)
        said.append(f"{kind}: " + ", ".join(
            f"{100 * share:.0f} % in {bits} bits" for bits, share in zip(asked, shares)))
    for (x, _), height, (kind, color) in zip(ends, apart([y for _, y in ends], 16), kinds.items()):
        picture.text(x + 14, height + 4, kind, f"{color} label")
    every = list(numbers["qwen3"])[::-1]
    losses = [line["loss"] for lines in numbers.values() for line in lines.values()]
    y = min(losses) / 1.3, max(losses) * 1.3
    right = Axes(picture, (384, 76, 180, 186), (-0.2, len(every) - 0.8), y, log=True)
    frame(right, [(i, bits) for i, bits in enumerate(every)],
          [tick for tick in (0.05, 0.1, 0.2, 0.5, 1, 2, 5) if min(losses) < tick < max(losses)], "{:g}".format)
    picture.text(384, 60, "loss of held-out answers, nats")
    ends = []
    for (package, lines), color in zip(numbers.items(), "abc"):
        points = [lines[bits]["loss"] for bits in every]
        ends.append(right.curve(list(enumerate(points)), color))
        said.append(f"loss of {NAMES[package]}: " + ", ".join(
            f"{loss:.3f} in {bits} bits" for bits, loss in zip(every, points)))
    for (x, _), height, package, color in zip(ends, apart([y for _, y in ends], 16), numbers, "abc"):
        picture.text(x + 10, height + 4, NAMES[package], f"{color} label")
    picture.text(24, 306, "bits of a weight below; 16: as published", "soft")
    return picture.svg("Answers and loss of the embedded models by bits", f"{'; '.join(said)}.".capitalize())


DRAW = {"outlier": draw_outlier, "errors": draw_errors, "answers": draw_answers}
