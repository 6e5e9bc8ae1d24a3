"""Text <-> token ids, and a conversation in the form that the model was trained on.

A model reads ids: rows of its embedding. Three steps lead from a text to them.

    text        "naïve"               of any language, normalised to NFC
    bytes       6E 61 C3 AF 76 65     UTF-8; 256 values spell everything, so no text is unknown
    tokens      "na"  "Ã¯"  "ve"      byte-pair encoding (BPE): frequent neighbours are merged, again and again
    ids         3376, 37572, 586      their places in Qwen3's vocabulary

BPE (Sennrich et al., arXiv:1508.07909) follows the list of merges in the checkpoint's tokenizer.json, and the library
`tokenizers` runs it. Decoding, streaming and the chat format are ours. So is the rule that keeps a conversation safe:

    Special tokens are put in by the chat format and never read out of text.

A user who types "<|im_end|>" sends the pieces of that text, "<", "|", "im", ..., and cannot end a turn.

Qwen3 reads a conversation as ChatML, and writes its answer after the last line:

    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from .config import Config
from .engine.chat_formats import (END_THINK, FORMATS, IM_END, IM_START, THINK, Format, Special, check_messages,
                                  find_ends, find_format, last_question, render, split_reasoning)
from .engine.templates import choose_format
from .engine.vocabulary import open_vocabulary, take_apart, with_words


class Tokenizer:
    """Encodes and decodes text, and writes conversations in the checkpoint's chat format.

    `format` is the chat format's name, and `thinking` what it allows: "switch", "always" or "never"; both are None
    where text is only continued, as by a Base checkpoint. `control_ids` are the special tokens by name, `end_of_turn`
    is the one that ends an answer, `bos_ids` stand before any text, and `notes` are lines for the user.
    """

    def __init__(self, library: tokenizers.Tokenizer, format: Format | str | None, notes: Iterable[str] = (),
                 directory: Path | None = None):
        self.chat_format = find_format(format)
        self.format, self.thinking, self.notes = self.chat_format.name, self.chat_format.thinking, list(notes)
        tokens, self.control_ids, words = take_apart(library, byte_alphabet(), directory)
        self.end_of_turn, self.bos_ids = find_ends(self.chat_format, self.control_ids)

        # The checkpoint's BPE without its special tokens: to this one, "<|im_end|>" is text like any other.
        bpe = tokenizers.Tokenizer(library.model)
        bpe.normalizer, bpe.pre_tokenizer = library.normalizer, library.pre_tokenizer
        self.bpe = with_words(bpe, words)  # ordinary words that a fine-tune added; the published checkpoints have none

        # What each id stands for. The files spell an ordinary token in the byte alphabet (below): `translate` turns
        # its characters into those below 256, which latin-1 encodes as bytes. A special token stands as it is.
        to_byte = {ord(character): byte for byte, character in enumerate(byte_alphabet())}
        self.bytes_of = {id: token.translate(to_byte).encode("latin-1") for id, token in tokens.items()}
        self.bytes_of |= {id: name.encode() for name, id in self.control_ids.items()}

    @classmethod
    def from_checkpoint(cls, directory: str | Path, chat_format: str | None = None) -> "Tokenizer":
        """Read the vocabulary, and find out the chat format.

        `chat_format`: None follows the checkpoint, the name of a format forces it, "plain" continues text as it is,
        and "template" uses the chat template even of a checkpoint that looks like a Base. Raises FileNotFoundError or
        ValueError naming the file that is missing, damaged or of another kind.
        """
        directory = Path(directory)
        library = open_vocabulary(directory, byte_alphabet())
        stop_ids = Config.from_checkpoint(directory).eos_token_id
        format, notes = choose_format(directory, library, stop_ids, chat_format)
        return cls(library, format, notes, directory)

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids. Adds nothing; special tokens spelled in the text stay text."""
        # Bytes of a command line that are no UTF-8 come from Python as surrogates, which are no text.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text, special tokens written out. Bytes that are no UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as the ids come, in pieces that can be printed.

        A character of several bytes may be split over tokens. Its bytes are held until it is whole; what is left of
        one at the end becomes U+FFFD. Ids beyond the vocabulary give nothing: the embedding has more rows than that.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if piece := utf8.decode(self.bytes_of.get(id, b"")):
                yield piece
        if piece := utf8.decode(b"", final=True):
            yield piece

    def chat(self, messages: list[dict[str, str]], thinking: bool = True) -> list[int]:
        """A conversation -> ids, up to and with the header of the assistant's next turn.

        A message is {"role": "system" | "user" | "assistant", "content": text}. An assistant's reasoning stands before
        </think> in the content, or apart as "reasoning_content". `thinking` matters only where the checkpoint has the
        switch. Raises ValueError for other roles, and where no chat format is used.
        """
        check_messages(messages)
        if self.chat_format == FORMATS["qwen3"]:
            return self.join(chatml(messages, thinking))
        return self.join(render(self.chat_format, messages, thinking, self.control_ids))  # of another family

    def join(self, parts: list[str]) -> list[int]:
        """Ids of texts and special tokens in turn. Neighbouring texts are merged first, since BPE sees across them."""
        ids, text = [], ""
        for part in parts:
            if isinstance(part, Special) and part in self.control_ids:
                ids += self.encode(text) + [self.control_ids[part]]
                text = ""
            else:  # text, or a token such as <think> that this vocabulary spells as text
                text += part
        return ids + self.encode(text)


def chatml(messages: list[dict[str, str]], thinking: bool) -> list[str]:
    """A conversation as Qwen3 was trained to see it: texts, and Special tokens (strings that are marked as such)."""
    parts, asked = [], last_question(messages)
    for i, message in enumerate(messages):
        content = [message["content"]]
        if message["role"] == "assistant":
            # Earlier reasoning would fill the context, so the template leaves it out. Only what follows the last
            # question keeps its own, and the very last message has a think block even if it is empty.
            reasoning, answer = split_reasoning(message)
            content = [answer]
            if i > asked and (reasoning or i == len(messages) - 1):
                content = [Special(THINK), "\n" + reasoning.strip("\n") + "\n", Special(END_THINK),
                           "\n\n" + answer.lstrip("\n")]
        parts += [Special(IM_START), message["role"] + "\n", *content, Special(IM_END), "\n"]
    parts += [Special(IM_START), "assistant\n"]
    if not thinking:  # the prompt holds an empty think block, so the model goes on with the answer
        parts += [Special(THINK), "\n\n", Special(END_THINK), "\n\n"]
    return parts


def byte_alphabet() -> str:
    """The 256 characters that byte-level BPE writes bytes with, byte 0 first.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and up, so that a vocabulary file
    shows no control characters: a space is "Ġ", a newline "Ċ" (GPT-2, Radford et al. 2019, section 2.2).
    """
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in shown else next(others)) for byte in range(256))
