"""2. Text <-> token ids, and the format of a conversation.

Text becomes UTF-8 bytes, bytes become tokens by byte-pair encoding (BPE; Sennrich et al., arXiv:1508.07909).
The merging is done by the `tokenizers` library from the checkpoint's tokenizer.json (or tiktoken.model, see
engine/tiktoken_vocab.py); what is ours is the chat format, decoding as the tokens come, and one rule:

    Control tokens are put in by this file and never read out of text.

A user who types "<｜User｜>" gets the pieces of that text and cannot begin a turn, though the file does not even
mark that token as special.

A checkpoint carries its chat format as a Jinja template, a program. It is never executed; it is enough to
recognise which of the published ones it is. No newlines between turns, and one <｜begin▁of▁sentence｜> first:

    V3, V3-0324         <｜User｜>question<｜Assistant｜>answer<｜end▁of▁sentence｜>       never thinks
    R1 first, R1-0528   <｜Assistant｜>                   the model writes <think> itself; past thoughts are left out
    R1                  <｜Assistant｜><think>\\n          the prompt does
    V3.1                <｜Assistant｜><think> or </think> a switch; past answers all follow </think>
    Moonlight, Kimi-K2  <|im_user|>user<|im_middle|>question<|im_end|><|im_assistant|>assistant<|im_middle|>
"""

import codecs
import re
from collections.abc import Iterable, Iterator
from itertools import chain, dropwhile, islice
from pathlib import Path

import tokenizers

from .config import Config, read_json
from .engine.tiktoken_vocab import read_tiktoken

# Full-width bars (U+FF5C) and low blocks (U+2581): no keyboard types them, and they are spelled here only.
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
THINK, END_THINK = "<think>", "</think>"
IM_MIDDLE, IM_END = "<|im_middle|>", "<|im_end|>"


# The published chat formats, and whether thinking is a switch in them.
FORMATS = {"V3": "never", "R1 first": "always", "R1": "always", "V3.1": "switch", "Moonlight": "never"}


class Control(str):
    """The name of a control token, as opposed to text that is spelled alike."""


class Tokenizer:
    """`thinking` says what the chat format allows: "switch", "always", "never"; None for a Base checkpoint."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, format: str | None, default_system: str = ""):
        self.format, self.thinking, self.default_system = format, FORMATS.get(format), default_system
        # The same BPE without the added tokens: for it, "<|im_end|>" is text like any other.
        self.text = tokenizers.Tokenizer(tokenizer.model)
        self.text.normalizer, self.text.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
        added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}
        self.control_ids = {content: id for id, content in added.items()}
        to_byte = {character: byte for byte, character in enumerate(byte_alphabet())}
        self.bytes_of = {id: content.encode() for id, content in added.items()}
        self.end_of_turn = self.control_ids.get(IM_END if format == "Moonlight" else EOS)
        self.bos_ids = [self.control_ids[BOS]] if BOS in self.control_ids else []  # stands before any text
        for token, id in tokenizer.get_vocab(with_added_tokens=False).items():
            if id not in self.bytes_of:  # BOS is in the vocabulary and among the added tokens
                self.bytes_of[id] = bytes(to_byte[character] for character in token)

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> "Tokenizer":
        """Read tokenizer.json or tiktoken.model, and the chat format from tokenizer_config.json or chat_template.jinja.

        Raises FileNotFoundError or ValueError naming the file that is missing, damaged or of another kind.
        """
        directory = Path(directory)
        path, ranks = directory / "tokenizer.json", directory / "tiktoken.model"
        if not path.is_file() and not ranks.is_file():
            raise FileNotFoundError(f"{path}: no such file, nor {ranks.name}; one of them holds the vocabulary, download the "
                                    "checkpoint again")
        try:
            path = path if path.is_file() else ranks
            tokenizer = read_tiktoken(ranks, byte_alphabet()) if path == ranks else tokenizers.Tokenizer.from_str(path.read_text("utf-8", "replace"))
            format, default_system = read_chat_format(directory)
            # An answer ends with a control token; a checkpoint that does not stop at <|im_end|> never learned turns.
            stops = Config.from_checkpoint(directory).eos_token_id
            if format == "Moonlight" and stops and tokenizer.token_to_id(IM_END) not in stops:
                format = None
            return cls(tokenizer, format, default_system)
        except (ValueError, OSError):
            raise
        except KeyError as error:
            raise ValueError(f"{path}: not a byte-level vocabulary, it contains {error}") from None
        except Exception as error:  # the library raises a bare Exception for every kind of damage
            raise ValueError(f"{path}: not a readable tokenizer ({error})") from None

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids. Adds nothing; control tokens spelled in the text stay text."""
        # Bytes of a command line that are no UTF-8 come from Python as surrogates, which are no text.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return self.text.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text, control tokens written out. Bytes that are no UTF-8 become U+FFFD."""
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

        Messages are {"role": "system" | "user" | "assistant", "content": text}. `thinking` matters only where the
        checkpoint has the switch. Raises ValueError for a Base checkpoint and for other roles.
        """
        if self.format is None:
            raise ValueError("this is a Base checkpoint: it continues plain text and has learned no conversation")
        roles = [check_message(message) for message in messages]
        if self.format == "Moonlight":
            if self.default_system and roles[:1] != ["system"]:
                messages = [{"role": "system", "content": self.default_system}, *messages]
            turns = [(message["role"], [message["content"], Control(IM_END)]) for message in messages]
            return self.join([part for role, text in (*turns, ("assistant", []))
                              for part in (Control(f"<|im_{role}|>"), role, Control(IM_MIDDLE), *text)])

        closed = [Control(END_THINK)] if self.format == "V3.1" else []
        system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        parts: list[str] = [Control(BOS), system]
        for role, message in zip(roles, messages):
            if role == "user":
                parts += [Control(USER), message["content"]]
            elif role == "assistant":
                parts += [Control(ASSISTANT), *closed, self.without_thoughts(message["content"]), Control(EOS)]
        parts += [Control(ASSISTANT)]
        if self.format == "R1":
            parts += [Control(THINK), "\n"]
        elif self.format == "V3.1":
            parts += [Control(THINK)] if thinking else closed
        return self.join(parts)

    def without_thoughts(self, content: str) -> str:
        """An earlier answer as the published templates repeat it: V3's whole, the others' from behind </think>."""
        if self.format == "V3":
            return content
        return content.split(END_THINK, 1 if self.format == "V3.1" else -1)[-1]

    def join(self, parts: list[str]) -> list[int]:
        """Ids of text and control tokens in turn; neighbouring texts are merged first, since BPE sees across them."""
        ids, text = [], ""
        for part in parts:
            if isinstance(part, Control):
                if part not in self.control_ids:
                    raise ValueError(f"the vocabulary has no {part}, which the chat format needs")
                ids += self.encode(text) + [self.control_ids[part]]
                text = ""
            else:
                text += part
        return ids + self.encode(text)


def dropping_newlines(pieces: Iterator[str]) -> Iterator[str]:
    """The same without the newlines at the beginning, which are the chat format's."""
    pieces = dropwhile(lambda piece: not piece.strip("\n"), pieces)
    return chain((piece.lstrip("\n") for piece in islice(pieces, 1)), pieces)


def check_message(message: dict[str, str]) -> str:
    """The role, if the message is one that can be written down."""
    role = message.get("role")
    if role not in ("system", "user", "assistant") or "tool_calls" in message:
        raise ValueError(f"a message has role {role!r}; known are system, user and assistant, without tool calls")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"the content of a message of role {role!r} is not text")
    return role


def read_chat_format(directory: Path) -> tuple[str | None, str]:
    """(Which of the published formats the checkpoint's template is, or None without one; its default system prompt)."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        template = path.read_text(encoding="utf-8", errors="replace")
    else:
        path = directory / "tokenizer_config.json"
        template = read_json(path).get("chat_template")
    if template is None:
        return None, ""
    if not isinstance(template, str):
        raise ValueError(f"{path}: chat_template is not text, so the format of a conversation is unknown")
    if IM_MIDDLE in template:
        default = re.search(r"<\|im_system\|>system<\|im_middle\|>([^<>{}'\"]+)<\|im_end\|>", template)
        return "Moonlight", default[1] if default else ""
    if USER not in template or ASSISTANT not in template:
        raise ValueError(f"{path}: the chat template is none of those that are known here")
    opening = template.rpartition("add_generation_prompt")[2]  # what is written where the answer begins
    if re.search(r"\bthinking\b", opening):
        return "V3.1", ""
    return "R1" if THINK in opening else "R1 first" if END_THINK in template else "V3", ""


def byte_alphabet() -> str:
    """The 256 characters that byte-level BPE writes bytes with, byte 0 first.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and up, so that a vocabulary file
    shows no control characters: a space is "Ġ", a newline "Ċ" (GPT-2, Radford et al. 2019, section 2.2).
    """
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in shown else next(others)) for byte in range(256))
