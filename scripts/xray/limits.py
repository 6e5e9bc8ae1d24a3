"""How much of a run is kept, so that the page stays below 4 MB whatever the model and the prompt.

A row is all that was computed while the model read the token at one position, and so how it chose the token after it.

    whole      every row, and of each head how much it looked at every earlier token: while that is small
    strongest  some rows of the answer, and of each head the 8 tokens that it looked at most; the rest is one number

The embedded models stay whole up to some 220 tokens. Of Qwen3-30B-A3B about 33 rows are kept, of DeepSeek-V3 eight.
"""

PAGE = 4_000_000  # bytes
WHOLE = 1_500_000  # layers x heads x tokens², of which the causal half is kept, a byte each
STRONGEST = 8  # keys of a head
KEYS = 1_500_000  # bytes of strongest keys: three bytes a key, a place and a share
LENS = 10**12  # multiplications of the head that the logit lens may cost: some ten seconds on two processors
SHARES = 1 << 24  # attention weights that are computed at a time


def most_rows(config) -> int:
    """How many rows a page has room for, where only the strongest keys are kept."""
    heads = config.num_hidden_layers * config.num_attention_heads
    head = (2 * config.num_hidden_layers + 1) * config.vocab_size * config.hidden_size
    return max(8, min(512, KEYS // (3 * STRONGEST * heads), LENS // head))


class Rows:
    """Chooses the rows that are kept, pass by pass: nobody knows beforehand how long an answer becomes.

    `prompt` is the number of its tokens. `asked` are the tokens (from, to) whose choice the user wants to see; the row
    of token t is t - 1. Without it the first rows of the answer are kept: once `end_of_thought` came, those after it.
    """

    def __init__(self, config, prompt: int, asked: tuple[int, int] | None = None, end_of_thought: int | None = None):
        self.heads = config.num_hidden_layers * config.num_attention_heads
        self.most, self.asked, self.end_of_thought = most_rows(config), asked, end_of_thought
        self.whole, self.prompt, self.start = True, prompt, prompt - 1

    def begin(self, first: int, tokens: int) -> None:
        """A pass begins that reads so many tokens, at the positions from `first` on."""
        self.whole = self.whole and self.heads * (first + tokens) ** 2 <= WHOLE

    def drawn(self, position: int, token: int) -> None:
        """A token of the answer was chosen, and has its place at `position`."""
        if token == self.end_of_thought:
            self.start, self.end_of_thought = position, None

    def __contains__(self, position: int) -> bool:
        if self.asked:
            wanted = self.asked[0] - 1 <= position < self.asked[1]
            return wanted and (self.whole or position < self.asked[0] - 1 + self.most)
        return self.whole or self.start <= position < self.start + self.most


def check_steps(config, asked: tuple[int, int] | None, prompt: int, new: int) -> None:
    """ValueError for --steps that no run can have, or that a page has no room for."""
    if asked is None:
        return
    first, last = asked
    if first >= prompt + new:
        raise ValueError(f"--steps {first}-{last}: prompt and answer have at most {prompt + new} tokens, numbered from "
                         f"0; the answer begins at {prompt}")
    heads = config.num_hidden_layers * config.num_attention_heads
    room = max(most_rows(config), int((WHOLE / heads) ** 0.5))
    if last - first + 1 > room:
        raise ValueError(f"--steps {first}-{last}: {last - first + 1} tokens, and a page of this model has room for "
                         f"{room}; choose fewer")
