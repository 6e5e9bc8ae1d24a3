"""The picture of the repository's first page: a sum in the terminal, and what happens inside at one of its digits."""

from .drawings import TEXT_SHADE, Shaded, percent


def draw_sum(numbers: dict) -> str:
    picture = Shaded(378)
    terminal(picture, numbers)
    (layer, *_), *_ = numbers["looked"]
    tokens, wrote, size, y = numbers["tokens"], numbers["wrote"], 46, 262
    words = f"Inside, as it writes the {wrote}: three heads of layer {layer} look back, each at one digit"
    picture.text(24, 186, words, "head")
    end = len(tokens) - 1
    picture.text(24, y + 20, "it has read", "soft")
    for i, token in enumerate(tokens):
        x = 104 + size * i
        seen = [share for _, _, at, share in numbers["looked"] if at == i]
        picture.cell(x, y, size - 4, 30, TEXT_SHADE * max(seen, default=0.2), "a" if seen else "g")
        picture.text(x + size / 2 - 2, y + 20, token, "mono middle")
    picture.text(104 + size * (end + 1) + 4, y + 20, f"→ {wrote}", "b label head")
    said = []
    start = 104 + size * end + size / 2 - 2
    for layer, head, at, share in numbers["looked"]:
        x, rise = 104 + size * at + size / 2 - 2, 12 + 4.5 * (end - at)
        picture.parts.append(f'<path d="M{start:.1f} {y} Q{(start + x) / 2:.1f} {y - 2 * rise:.1f} {x:.1f} {y}" '
                             f'class="a"/>')
        picture.text(x, y + 48, f"head {head}", "soft middle")
        picture.text(x, y + 65, percent(share), "a label middle")
        said.append(f"layer {layer}, head {head} at {tokens[at]} ({percent(share)})")
    carried = max(at for _, _, at, _ in numbers["looked"])  # a column is written as digit + digit + carry
    picture.text(104 + size * carried + size / 2 - 2, y + 82, "the carried digit", "soft middle")
    chances = numbers["chances"]
    left, floor, step = 540, y + 48, 32
    picture.text(left - 2, 212, f"chance of the {wrote}", "soft")
    picture.line([(left - 2, floor), (left + step * len(chances), floor)], "axis thin")
    for layer, chance in enumerate(chances):
        height = max(1, 70 * chance)
        picture.bar(left + step * layer, floor - height, step - 6, height, "b")
        picture.text(left + step * layer + step / 2 - 3, floor + 16, str(layer), "soft middle")
        if chance >= 0.01:
            words = percent(chance).replace(" ", "")
            picture.text(left + step * layer + step / 2 - 3, floor - height - 5, words, "soft middle")
    picture.text(left - 2, floor + 34, "after layer", "soft")
    picture.text(24, 364, "numbers of a real run of the embedded Qwen3-Tiny, as scripts.xray shows them", "soft")
    rise = ", ".join(percent(chance) for chance in chances)
    return picture.svg("A sum in the terminal, and inside of the model", (
        f"Asked “{numbers['question']}”, Qwen3-Tiny writes: {' '.join(numbers['thought'])} {numbers['answer']}. "
        f"When it writes the {wrote}, three heads look most at three digits: {'; '.join(said)}. The chance of {wrote} "
        f"after each layer: {rise}."))


def terminal(picture: Shaded, numbers: dict) -> None:
    """The command, the thought line by line, and the answer."""
    picture.cell(16, 16, 688, 136, 0.12, "g")
    picture.text(30, 40, f'$ uv run python -m qwen3.main -p "{numbers["question"]}"', "mono")
    for i, line in enumerate(numbers["thought"]):
        picture.text(30, 60 + 18 * i, line, "mono soft")
    picture.text(30, 60 + 18 * len(numbers["thought"]) + 2, numbers["answer"], "mono head")


DRAW = {"sum": draw_sum}
