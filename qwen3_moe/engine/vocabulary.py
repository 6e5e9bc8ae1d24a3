"""A checkpoint's vocabulary, from tokenizer.json or tiktoken.model: read, checked and taken apart.

What the published files never have is dealt with here: damage, other kinds of tokenizer, and tokens that a fine-tune
added. Such a token is either a word, which text may become, or special, if it could be used to forge a turn.
"""

from pathlib import Path
from types import SimpleNamespace

import tokenizers

from .chat_formats import NUMBERED, PUBLISHED, SPELLED
from .fields import one_line
from .templates import find_template
from .tiktoken_vocab import read_tiktoken


def open_vocabulary(directory: Path, alphabet: str) -> tokenizers.Tokenizer:
    """The vocabulary in a folder, as a tokenizer of the library.

    `alphabet` are the 256 characters that stand for bytes. Raises FileNotFoundError or ValueError naming the file.
    """
    path, ranks = directory / "tokenizer.json", directory / "tiktoken.model"
    if not path.is_file() and not ranks.is_file():
        raise FileNotFoundError(f"{path}: no such file, nor {ranks.name}; one of them holds the vocabulary, "
                                "download the checkpoint again")
    path = path if path.is_file() else ranks
    try:
        library = read_tiktoken(ranks, alphabet) if path == ranks else read_tokenizer(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a readable tokenizer (it is no UTF-8 text); download it again") from None
    except (ValueError, OSError):
        raise
    except BaseException as error:  # the library raises a bare Exception for every kind of damage, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: not a readable tokenizer ({one_line(error, 80)})") from None
    model = library.model
    if not isinstance(model, tokenizers.models.BPE):
        raise ValueError(f"{path}: its model is {type(model).__name__}, only byte-level BPE is read here")
    if model.dropout:
        raise ValueError(f"{path}: its BPE has a dropout of {model.dropout}, so a text would have other ids each time")
    return library


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """tokenizer.json by the library. It panics at a word prefix, which byte-level BPE has none of."""
    text = path.read_text("utf-8")
    for field in ('"continuing_subword_prefix":', '"end_of_word_suffix":'):
        start = text.find(field) + len(field)  # not by a pattern: that takes a tenth of a second
        if start >= len(field) and text[start:start + 3].lstrip()[:1] == '"' and text[start:start + 3].strip() != '""':
            raise ValueError(f"{path}: its BPE marks where words continue or end, only byte-level BPE is read here")
    return tokenizers.Tokenizer.from_str(text)


def take_apart(library: tokenizers.Tokenizer, alphabet: str, directory: Path | None = None
               ) -> tuple[dict[int, str], dict[str, int], dict[int, tokenizers.AddedToken]]:
    """({id: token spelled in the alphabet}, {special token: id}, {id: word that a fine-tune added}).

    `directory` is where the library's tokenizer was read: what its chat template writes is special, and errors name it.
    """
    template = find_template(directory)[0] or "" if directory else ""
    added = library.get_added_tokens_decoder()
    words = {id: token for id, token in sorted(added.items()) if is_word(token, template)}
    special = {token.content: id for id, token in added.items() if id not in words}
    ordinary = library.get_vocab(with_added_tokens=False)
    for id, token in added.items():  # an added token may stand in the vocabulary too
        ordinary.pop(token.content, None)
    if foreign := set("".join(ordinary)) - set(alphabet):
        token, id = next((token, id) for token, id in ordinary.items() if foreign & set(token))
        character = next(character for character in token if character in foreign)
        path = f"{directory / 'tokenizer.json'}: " if directory else ""
        raise ValueError(f"{path}not a vocabulary of byte-level BPE: token {id} holds the character {character!r}")
    tokens = {id: token for token, id in ordinary.items() if id not in added}
    tokens |= {id: "".join(alphabet[byte] for byte in token.content.encode()) for id, token in words.items()}
    return tokens, special, words


def is_word(token: tokenizers.AddedToken, template: str) -> bool:
    """Whether an added token is an ordinary word of a text, and none with which a user could forge a turn."""
    content = token.content
    of_the_format = content in template and not content.isalnum()
    spells_a_marker = any(marker in content for marker in SPELLED)
    barred = content in PUBLISHED or NUMBERED.fullmatch(content)
    return not (token.special or spells_a_marker or barred or of_the_format)


def with_words(bpe: tokenizers.Tokenizer,
               words: dict[int, tokenizers.AddedToken]) -> "tokenizers.Tokenizer | WithWords":
    """The BPE of plain text, and words that a fine-tune added to it."""
    return WithWords(bpe, words) if words else bpe


class WithWords:
    """Encodes as the library does. The library numbers added words anew; here they have the checkpoint's ids."""

    def __init__(self, bpe: tokenizers.Tokenizer, words: dict[int, tokenizers.AddedToken]):
        bpe.add_tokens(list(words.values()))
        self.bpe = bpe
        self.own_ids = {bpe.token_to_id(word.content): id for id, word in words.items()}

    def encode(self, text: str, add_special_tokens: bool = False) -> SimpleNamespace:
        ids = self.bpe.encode(text, add_special_tokens=add_special_tokens).ids
        return SimpleNamespace(ids=[self.own_ids.get(id, id) for id in ids])
