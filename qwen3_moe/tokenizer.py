"""Text <-> token ids, and a conversation as the checkpoint was trained to see it.

Text becomes UTF-8 bytes, bytes become tokens by byte-pair encoding (BPE; Sennrich et al., arXiv:1508.07909).
The merging is done by the `tokenizers` library, from the checkpoint's tokenizer.json (or tiktoken.model). What is
ours is decoding as the tokens come, the chat format, and one rule:

    Special tokens are put in by the chat format and never read out of text.

A user who types "<|im_end|>" gets the pieces of that text, "<", "|", "im", ..., and cannot end a turn.
A checkpoint's chat format lies beside it as a template, a program. It is recognised, never run (engine/templates.py):

    Qwen3         <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
                  and <think>\\n\\n</think>\\n\\n after it where thinking is switched off
    DeepSeek-R1   <｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\\n
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from .config import Config
from .engine.chat_formats import (ASSISTANT, BOS, END_THINK, EOS, FIRST, IM_END, IM_START, MARKERS, NUMBERED, PUBLISHED, SPELLED,  # noqa: F401
                                  THINK, USER, Format, Special, named, render)
from .engine.fields import one_line
from .engine.templates import choose_format, find_template
from .engine.tiktoken_vocab import read_tiktoken


class Tokenizer:
    """`thinking` says what the chat format allows: "switch", "always", "never"; None where text is continued as it is.

    `control_ids` are the special tokens by name, `end_of_turn` the one that ends an answer, `bos_ids` those that
    stand before any text, `format` is the chat format's name, and `notes` are lines for the user.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, format: Format | str | None, notes: Iterable[str] = (), template: str = ""):
        self.chat_format = named(format) if isinstance(format, str) else format
        self.notes = list(notes)
        self.format, self.thinking = (self.chat_format.name, self.chat_format.thinking) if self.chat_format else (None, None)
        added = tokenizer.get_added_tokens_decoder()
        words = {id: token for id, token in sorted(added.items()) if is_word(token, template)}
        self.control_ids = {token.content: id for id, token in added.items() if id not in words}
        # The same BPE without the special tokens: for it, "<|im_end|>" is text like any other.
        self.text = tokenizers.Tokenizer(tokenizer.model)
        self.text.normalizer, self.text.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        self.text.add_tokens(list(words.values()))  # words that a fine-tune added; the library numbers them anew
        self.own_ids = {self.text.token_to_id(token.content): id for id, token in words.items()}
        ends = [MARKERS[self.chat_format.family][0]] if self.chat_format else [IM_END, EOS]
        self.end_of_turn = next((self.control_ids[name] for name in ends if name in self.control_ids), None)
        self.bos_ids = next(([self.control_ids[name] for name in first] for first in FIRST if set(first) <= set(self.control_ids)), [])
        # A token is spelled in an alphabet of 256 characters; what is none of them becomes one that is no byte.
        to_byte = dict.fromkeys(range(256), "\uffff") | {ord(character): chr(byte) for byte, character in enumerate(byte_alphabet())}
        self.bytes_of = {id: token.content.encode() for id, token in added.items()}
        spelled = {token.content for token in added.values()}
        for token, id in tokenizer.get_vocab(with_added_tokens=False).items():
            if id not in self.bytes_of and token not in spelled:  # a special token may stand in the vocabulary too
                try:
                    self.bytes_of[id] = token.translate(to_byte).encode("latin-1")
                except UnicodeEncodeError as error:
                    raise ValueError(f"not a vocabulary of byte-level BPE: token {id} holds the character {token[error.start]!r}") from None

    @classmethod
    def from_checkpoint(cls, directory: str | Path, chat_format: str | None = None) -> "Tokenizer":
        """Read tokenizer.json or tiktoken.model, and find out the chat format.

        `chat_format`: None guesses, the name of a format forces it, "plain" continues text as it is, and "template"
        follows the template even where the checkpoint looks like a Base. Raises FileNotFoundError or ValueError
        naming the file that is missing, damaged or of another kind.
        """
        directory = Path(directory)
        path, ranks = directory / "tokenizer.json", directory / "tiktoken.model"
        if not path.is_file() and not ranks.is_file():
            raise FileNotFoundError(f"{path}: no such file, nor {ranks.name}; one of them holds the vocabulary, download the "
                                    "checkpoint again")
        path = path if path.is_file() else ranks
        try:
            tokenizer = read_tiktoken(ranks, byte_alphabet()) if path == ranks else read_tokenizer(path)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a readable tokenizer (it is no UTF-8 text); download it again") from None
        except (ValueError, OSError):
            raise
        except BaseException as error:  # the library raises a bare Exception for every kind of damage, or panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{path}: not a readable tokenizer ({one_line(error, 80)})") from None
        if not isinstance(tokenizer.model, tokenizers.models.BPE):
            raise ValueError(f"{path}: its model is {type(tokenizer.model).__name__}, only byte-level BPE is read here")
        if tokenizer.model.dropout:
            raise ValueError(f"{path}: its BPE has a dropout of {tokenizer.model.dropout}, so a text would have other ids each time")
        vocabulary = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items()}
        folder = directory if directory.name else directory.resolve()  # notes name it
        format, notes = choose_format(folder, vocabulary, Config.from_checkpoint(directory).eos_token_id, chat_format)
        try:
            return cls(tokenizer, format, notes, find_template(directory)[0] or "")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids. Adds nothing; special tokens spelled in the text stay text."""
        # Bytes of a command line that are no UTF-8 come from Python as surrogates, which are no text.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return [self.own_ids.get(id, id) for id in self.text.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text, special tokens written out. Bytes that are no UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text as the ids come, in pieces that can be printed.

        A character of several bytes may be split over tokens; its bytes are held until it is whole, and what
        is left of one at the end becomes U+FFFD. Ids that the vocabulary does not have (the embedding of the
        published checkpoints has more rows) give nothing.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for id in ids:
            if piece := utf8.decode(self.bytes_of.get(id, b"")):
                yield piece
        if piece := utf8.decode(b"", final=True):
            yield piece

    def chat(self, messages: list[dict[str, str]], thinking: bool = True) -> list[int]:
        """A conversation -> ids, up to and with the header of the assistant's next turn.

        Messages are {"role": "system" | "user" | "assistant", "content": text}, an assistant's with its
        reasoning before </think> in the content or apart as "reasoning_content". `thinking` matters only
        where the checkpoint has the switch. Raises ValueError where no chat format is used, and for other roles.
        """
        if self.chat_format is None:
            raise ValueError("this is taken for a Base checkpoint, which continues plain text; from_checkpoint(folder, "
                             'chat_format="template") follows its chat template, and a name of a format forces that one')
        return self.join(render(self.chat_format, messages, thinking))

    def join(self, parts: list[str]) -> list[int]:
        """Ids of text and special tokens in turn; neighbouring texts are merged first, since BPE sees across them."""
        ids, text = [], ""
        for part in parts:
            if isinstance(part, Special) and part in self.control_ids:
                ids += self.encode(text) + [self.control_ids[part]]
                text = ""
            elif part == BOS and isinstance(part, Special):
                continue  # a vocabulary without it was trained without it
            else:  # text, or a token such as <think> that this vocabulary spells as text
                text += part
        return ids + self.encode(text)


def is_word(token: tokenizers.AddedToken, template: str) -> bool:
    """Whether an added token is an ordinary word of a text, and none with which a user could forge a turn."""
    content = token.content
    of_the_format = content in template and not content.isalnum()
    spells_a_marker = any(marker in content for marker in SPELLED)
    return not (token.special or spells_a_marker or content in PUBLISHED or NUMBERED.fullmatch(content) or of_the_format)


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """tokenizer.json by the library. It panics at a word prefix, which byte-level BPE has none of."""
    text = path.read_text("utf-8")
    for field in ('"continuing_subword_prefix":', '"end_of_word_suffix":'):
        start = text.find(field) + len(field)  # not by a pattern: that takes a tenth of a second
        if start >= len(field) and text[start:start + 3].lstrip()[:1] == '"' and text[start:start + 3].strip() != '""':
            raise ValueError(f"{path}: its BPE marks where words continue or end, only byte-level BPE is read here")
    return tokenizers.Tokenizer.from_str(text)


def byte_alphabet() -> str:
    """The 256 characters that byte-level BPE writes bytes with, byte 0 first.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and up, so that a vocabulary file
    shows no control characters: a space is "Ġ", a newline "Ċ" (GPT-2, Radford et al. 2019, section 2.2).
    """
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in shown else next(others)) for byte in range(256))
