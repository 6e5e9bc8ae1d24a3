r"""From text to batches: the tokenizer is learned, conversations become token ids, and rows are packed full.

    turn    <|im_start|>user\nWhat is RoPE?<|im_end|>\n<|im_start|>assistant\n   RoPE turns …<|im_end|>
            └─ prompt: read, never a target ────────────────────────────────┘   └─ targets ──────────┘
    row     turn turn turn tu|     one after the other, cut where the row is full: no padding
    batch   B rows of T tokens, B · T nearly the same at every step
"""

import random
from collections.abc import Callable, Iterable, Iterator

from deepseek_v3.tokenizer import ASSISTANT, BOS, EOS, USER  # noqa: I001  before torch: see qwen3/__init__.py
from qwen3.tokenizer import END_THINK, IM_END, IM_START, THINK

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from .corpus import Corpus

ENDOFTEXT, PAD = "<|endoftext|>", "<\uff5c\u2581pad\u2581\uff5c>"
# package -> its special tokens
SPECIAL = {"qwen3": (ENDOFTEXT, IM_START, IM_END, THINK, END_THINK)}
SPECIAL |= {"qwen3_moe": SPECIAL["qwen3"], "deepseek_v3": (PAD, BOS, EOS, USER, ASSISTANT, THINK, END_THINK)}

# Like Qwen3's own pattern: contractions, words with a leading space, digits one by one, punctuation, white space.
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

SEED = 20
TOKENS = 4096  # of one batch
ROWS = {160: 80, 512: 12, 2048: 8}  # length of a row -> share of the steps; some are as long as a conversation
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a teacher.", "Answer in one sentence.", "Be brief."]

Ids = list[int]
Part = tuple[Ids, int, int]  # of a row: its ids, and which of them are targets, from the first up to the last


def train_tokenizer(texts: Iterable[str], package: str, vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE on the texts: Qwen3's normaliser and pieces, the package's special tokens, a small vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=text not in (THINK, END_THINK, USER, ASSISTANT), normalized=False)
               for text in SPECIAL[package]]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(special), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(special)  # after the vocabulary, as in the published files
    return tokenizer


class Turns:
    """Questions and answers as parts of a row, in the chat format of a package's Tokenizer.

    A turn has three forms, as in a conversation: its question answered with a think block, answered directly, or
    answered long ago. Qwen3 leaves the think block of earlier turns away, so that the form shows.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids = tokenizer.control_ids  # of the special tokens
        self.opens_itself = tokenizer.format == "qwen3"  # its think block; for DeepSeek the prompt has opened it
        self.system_prompts = {text: self.system(text) for text in SYSTEM_PROMPTS}

    def system(self, text: str) -> Ids:
        """A system prompt alone."""
        messages = [{"role": "system", "content": text}, {"role": "user", "content": "?"}]
        return self.tokenizer.chat(messages)[len(self.tokenizer.bos_ids):-len(self.prompt("?", True))]

    def prompt(self, question: str, thinking: bool, cut: int = 0) -> Ids:
        """`cut`: a place in the question, also in the middle of a word, where one token has to end."""
        ids = self.tokenizer.chat([{"role": "user", "content": question}], thinking)
        if cut:
            usual = self.tokenizer.encode(question)
            at = next((i for i in range(len(ids)) if ids[i:i + len(usual)] == usual), None)
            if at is not None:
                pieces = self.tokenizer.encode(question[:cut]) + self.tokenizer.encode(question[cut:])
                ids = ids[:at] + pieces + ids[at + len(usual):]
        return ids[len(self.tokenizer.bos_ids):]  # it stands once, before the whole conversation

    def turn(self, question: str, thought: str | None, answer: str, earlier: bool = False, cut: int = 0) -> Part:
        """`thought` None: answered directly. `earlier`: in the form of an earlier turn. `cut`: as for `prompt`."""
        if earlier and self.opens_itself:
            prompt = self.prompt(question, True, cut)
            # Whether a think block follows cannot be seen from the prompt; so the first token is no target.
            return self.closed(prompt, self.tokenizer.encode(answer), unseen=1)
        return self.closed(self.prompt(question, thought is not None, cut), self.written(thought, answer))

    def answered(self, messages: list[dict[str, str]], thought: str | None, answer: str) -> Part:
        """A whole conversation with its answer."""
        prompt = self.tokenizer.chat(messages, thinking=thought is not None)[len(self.tokenizer.bos_ids):]
        return self.closed(prompt, self.written(thought, answer))

    def written(self, thought: str | None, answer: str) -> Ids:
        """What the model has to write after the prompt, without the token that ends the turn."""
        encode = self.tokenizer.encode
        if thought is None:
            return encode(answer)
        if self.opens_itself:
            return [self.ids[THINK], *encode(f"\n{thought}\n"), self.ids[END_THINK], *encode("\n\n"), *encode(answer)]
        return [*encode(thought), self.ids[END_THINK], *encode(answer)]

    def closed(self, prompt: Ids, written: Ids, unseen: int = 0) -> Part:
        """Prompt and answer; ChatML puts a new line after the end of a turn, which nobody has to write."""
        ids = [*prompt, *written, self.tokenizer.end_of_turn]
        chatml = self.tokenizer.end_of_turn == self.ids.get(IM_END)
        return ids + (self.tokenizer.encode("\n") if chatml else []), len(prompt) + unseen, len(ids)


def of_corpus(corpus: Corpus, turns: Turns, rng: random.Random) -> Iterator[Part]:
    """Conversations without end: in about half of the rows the turns are those of one long conversation."""
    history = 0.0 if rng.random() < 0.5 else 0.75
    yield turns.tokenizer.bos_ids, 0, 0
    if rng.random() < 0.1:
        yield turns.system_prompts[rng.choice(SYSTEM_PROMPTS)], 0, 0
    while True:
        thinking = rng.random() < 0.4
        question, thought, answer = corpus.draw(rng, thinking)
        # A typing error cuts a word into other tokens than usual; so that these are known, too, a third of the
        # questions is cut somewhere (the idea of BPE-dropout, arXiv:1910.13267).
        cut = rng.randrange(len(question)) if rng.random() < 1 / 3 else 0
        yield turns.turn(question, thought if thinking else None, answer, rng.random() < history, cut)


def tokenizer_texts(corpus: Corpus) -> Iterator[str]:
    """What the corpus's tokenizer is learned from; the roles of ChatML's headers too."""
    rng = random.Random(SEED)
    for _ in range(20000):
        yield "\n".join(("user", "assistant\n", *corpus.draw(rng, thinking=True)))


def pack(parts: Iterator[Part], T: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: ids (T,) and the token that follows each, -100 (which losses leave out) where it is no target."""
    ids, targets = [], []
    while len(ids) <= T:
        new, first, end = next(parts)
        ids += new
        targets += [token if first <= i < end else -100 for i, token in enumerate(new)]
    return torch.tensor(ids[:T]), torch.tensor(targets[1:T + 1])


def batch(rows: Callable[[random.Random], Iterator[Part]], seed: int, step: int,
          lengths: dict[int, int] = ROWS, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets (B, T) of a step. A function of seed and step alone, so that any step can be made again."""
    rng = random.Random(f"{seed} {step}")
    (T,) = rng.choices(list(lengths), list(lengths.values()))
    ids, targets = zip(*(pack(rows(rng), T) for _ in range(max(1, tokens // T))))
    return torch.stack(ids), torch.stack(targets)
