"""A real run of Qwen3-Tiny in float32 -> the numbers of the picture of the repository's first page."""

from .examples import READS_DIGITS, SUM, last_column, recorded
from .terminal import shares


def measure_sum() -> dict:
    """What the terminal shows of a sum, and how the model comes to the first digit of the result."""
    _, run, tokens = recorded("Qwen3-Tiny", SUM)
    begin, end = last_column(tokens)
    thought, answer = "".join(tokens).partition("<think>⏎")[2].split("</think>")
    row, looked = run["steps"].index(end), []
    for layer, head in READS_DIGITS:
        found = shares(run, row, layer, head)[begin:]
        at = found.index(max(found))
        looked.append([layer, head, at, round(found[at], 3)])
    return {"question": SUM, "thought": thought.replace("·", " ").split("⏎")[:-1],
            "answer": answer.partition("<")[0].strip("⏎"), "tokens": tokens[begin:end + 1], "wrote": tokens[end + 1],
            "looked": looked, "chances": [round(chance, 4) for chance in run["lens"]["written"][row][2::2]]}


MEASURE = {"sum": measure_sum}
