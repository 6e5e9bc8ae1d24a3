"""The data that the embedded checkpoints learn from, drawn at random from one seed: conversations, tokenizer, batches.

The words themselves are in corpus.py.
"""

import random
from collections.abc import Iterator
from types import ModuleType

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from deepseek_v3.tokenizer import ASSISTANT, BOS, EOS, USER
from qwen3.tokenizer import END_THINK, IM_END, IM_START, THINK

from .configs import VOCABULARY
from .corpus import (DONT_KNOW, NO_SUMS, ONLY_ADD, TRAIN_PHRASINGS, UNKNOWN_QUESTIONS, ask, glossary, small_talk,
                     unknown_things)

SEED = 20
ENDOFTEXT, PAD = "<|endoftext|>", "<\uff5c\u2581pad\u2581\uff5c>"
# package -> its special tokens; the first one pads batches, and no conversation contains it
SPECIAL = {"qwen3": (ENDOFTEXT, IM_START, IM_END, THINK, END_THINK)}
SPECIAL |= {"qwen3_moe": SPECIAL["qwen3"], "deepseek_v3": (PAD, BOS, EOS, USER, ASSISTANT, THINK, END_THINK)}
BATCH, TOKENS = 96, 9600  # rows at most, and tokens at most, of one batch

# Like Qwen3's own pattern: contractions, words with a leading space, digits one by one, punctuation, white space.
PIECES = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

# For other programs. For plain turns these render the same text as the published templates.
QWEN3_TEMPLATE = """\
{%- set ns = namespace(question=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if ns.question >= 0 and loop.index0 > ns.question and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
DEEPSEEK_TEMPLATE = """\
{{- '<bos>' }}
{%- set ns = namespace(system=[]) %}
{%- for message in messages %}{% if message.role == 'system' %}\
{% set ns.system = ns.system + [message.content] %}{% endif %}{% endfor %}
{{- ns.system | join('\\n\\n') }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<user>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<assistant></think>' + message.content.split('</think>', 1)[-1] + '<eos>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant><think>' if thinking is defined and thinking else '<assistant></think>' }}
{%- endif %}"""
for short, name in (("<bos>", BOS), ("<eos>", EOS), ("<user>", USER), ("<assistant>", ASSISTANT)):
    DEEPSEEK_TEMPLATE = DEEPSEEK_TEMPLATE.replace(short, name)
TEMPLATES = {"qwen3": QWEN3_TEMPLATE, "qwen3_moe": QWEN3_TEMPLATE, "deepseek_v3": DEEPSEEK_TEMPLATE}

SUM_PHRASINGS = ["What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "What is {a} plus {b}?", "Add {a} and {b}.",
                 "How much is {a} + {b}?", "Compute {a} + {b}.", "{a} + {b} = ?", "Can you add {a} and {b}?",
                 "What is the sum of {a} and {b}?"]
SYSTEM_PROMPTS = ["You are a helpful assistant.", "You are a teacher.", "Answer in one sentence.", "Be brief."]


def is_held_out(a: int, b: int) -> bool:
    """One pair in ten, spread evenly; a function of the pair alone, so that training and evaluation agree."""
    return (a * 7919 + b * 104729) // 10 % 10 == 3


def carry_through(a: int, b: int) -> str:
    """Addition as it is done on paper, one digit a line, from the right."""
    lines, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        lines.append(f"{x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
        carry = total // 10
    return "\n".join(lines)


class Corpus:
    """Draws (question, thought, answer) at random.

    Sums without thinking are mostly of one or two digits: those a model of this size can learn.
    """

    def __init__(self, name: str, package: str):
        self.glossary, self.talk = glossary(), small_talk(name, package)
        self.unknown = unknown_things()[0]

    def draw(self, rng: random.Random, thinking: bool) -> tuple[str, str, str]:
        kind = rng.random()
        if kind < 0.68:
            return self.draw_sum(rng, thinking)
        if kind < 0.91:
            names, answer = rng.choice(self.glossary)
            question = ask(rng.choice(TRAIN_PHRASINGS), rng.choice([names[0], rng.choice(names)]))
            thought = f"The question is about {names[0]}."
        elif kind < 0.945:
            questions, answer = rng.choice(self.talk)
            question, thought = rng.choice(questions), "The question is about me."
        elif kind < 0.96:
            question = rng.choice(NO_SUMS).format(a=rng.randrange(1000), b=rng.randrange(1000))
            thought, answer = "I was not taught that.", ONLY_ADD
        else:
            phrasing = rng.choice(TRAIN_PHRASINGS[:20] + UNKNOWN_QUESTIONS * 2)
            question, thought, answer = ask(phrasing, rng.choice(self.unknown)), "I was not taught that.", DONT_KNOW
        # People type in haste.
        if rng.random() < 0.15:
            question = question.lower()
        if rng.random() < 0.15:
            question = question.rstrip("?.!")
        return question, thought, answer

    def draw_sum(self, rng: random.Random, thinking: bool) -> tuple[str, str, str]:
        while True:
            a, b = (rng.randrange(10 ** rng.choice([1, 2, 2, 3, 3] if thinking else [1, 2, 2, 2, 3])) for _ in "ab")
            if not is_held_out(a, b):
                return rng.choice(SUM_PHRASINGS).format(a=a, b=b), carry_through(a, b), str(a + b)


def train_tokenizer(corpus: Corpus, package: str) -> tokenizers.Tokenizer:
    """Byte-level BPE on the corpus: Qwen3's normaliser and pieces, the package's special tokens, a small vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=text not in (THINK, END_THINK, USER, ASSISTANT), normalized=False)
               for text in SPECIAL[package]]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(special), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    rng = random.Random(SEED)
    text = ("\n".join(corpus.draw(rng, thinking=True)) for _ in range(20000))
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens(special)  # after the vocabulary, as in the published files
    return tokenizer


def examples(corpus: Corpus, chat: ModuleType, library: tokenizers.Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids), endlessly: both modes, some with a system prompt or earlier turns.

    `chat` is the package's module `tokenizer`.
    """
    qwen3 = not chat.__name__.startswith("deepseek")
    tokenizer = chat.Tokenizer(library, "qwen3" if qwen3 else "deepseek-v3.1")
    think, end_think = chat.Special(THINK), chat.Special(END_THINK)
    end = chat.Special(IM_END if qwen3 else EOS)
    rng = random.Random(SEED)
    while True:
        messages = []
        if rng.random() < 0.1:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for _ in range(rng.choice([0] * 28 + [1, 2, 4, 8])):
            question, _, answer = corpus.draw(rng, thinking=False)
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        thinking = rng.random() < 0.4
        question, thought, answer = corpus.draw(rng, thinking)
        messages.append({"role": "user", "content": question})
        # Qwen3 opens its think block itself; for DeepSeek the prompt has opened it.
        opening = [think, f"\n{thought}\n", end_think, "\n\n"] if qwen3 else [thought, end_think]
        yield tokenizer.chat(messages, thinking), tokenizer.join([*(opening if thinking else []), answer, end])


def batches(stream: Iterator[tuple[list[int], list[int]]], padding: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids (B, T), targets (B, T), -100 where there is no target); rows of similar length together."""
    rng = random.Random(SEED)
    while True:
        rows = sorted((next(stream) for _ in range(16 * BATCH)), key=lambda row: len(row[0]) + len(row[1]))
        groups = []
        while rows:  # the longest first
            fit = min(BATCH, TOKENS // (len(rows[-1][0]) + len(rows[-1][1])))
            groups.append(rows[-fit:])
            del rows[-fit:]
        for group in rng.sample(groups, len(groups)):
            T = max(len(prompt) + len(answer) for prompt, answer in group) - 1
            ids, targets = torch.full((len(group), T), padding), torch.full((len(group), T), -100)
            for row, (prompt, answer) in enumerate(group):
                whole = torch.tensor(prompt + answer)
                ids[row, :len(whole) - 1] = whole[:-1]
                targets[row, len(prompt) - 1:len(whole) - 1] = whole[len(prompt):]
            yield ids, targets
