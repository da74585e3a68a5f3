"""Text to token ids, and ids to bytes, with the checkpoint's tokenizer.json. One `Tokenizer` serves all requests."""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from model.vocabulary import NAMED, byte_of_character


class InvalidTokenizer(ValueError):
    """The tokenizer's files are missing or damaged, or its kind is not supported."""


@dataclass(frozen=True, kw_only=True)
class SpecialToken:
    """A control token: it controls the model and is never part of a text."""

    id: int
    text: str
    takes_space_before: bool
    takes_space_after: bool


class Tokenizer:
    """A byte-level BPE tokenizer with its control tokens."""

    def __init__(self, definition: str, settings: dict[str, Any]) -> None:
        """``definition`` is the text of tokenizer.json, ``settings`` the object in tokenizer_config.json."""
        try:
            self._plain, self._with_control = (tokenizers.Tokenizer.from_str(definition) for _ in range(2))
        except Exception as error:  # the library raises plain `Exception`
            raise InvalidTokenizer(f"tokenizer.json cannot be read: {error}") from error
        if not isinstance(self._plain.decoder, tokenizers.decoders.ByteLevel):
            raise InvalidTokenizer("tokenizer.json has no ByteLevel decoder; only byte-level BPE tokenizers are supported")
        self.named = {name: text for name in NAMED if (text := _token_text(settings.get(name))) is not None}
        """The texts of the special tokens that have a name, such as ``eos_token``."""
        ends = bool(settings.get("add_eos_token")) and "eos_token" in self.named
        self.appended_eos_id: int | None = self._plain.token_to_id(self.named["eos_token"]) if ends else None
        """The token that `add_eos_token` appends to every text, or None. Only some embedding models set it; their own code appends it."""
        for tokenizer in (self._plain, self._with_control):
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.add_special_tokens([text for text in self.named.values() if tokenizer.token_to_id(text) is not None])
        self._plain.encode_special_tokens = True  # "special tokens in text are text"; never changed, as the object is shared
        self._added = self._plain.get_added_tokens_decoder()
        self._bytes: dict[int, bytes] = {}
        self.special_tokens = tuple(
            SpecialToken(id=token, text=added.content, takes_space_before=added.lstrip, takes_space_after=added.rstrip)
            for token, added in sorted(self._added.items())
            if added.special
        )
        self.special_ids = frozenset(special.id for special in self.special_tokens)
        self.num_real_tokens = max(self._plain.get_vocab(with_added_tokens=True).values()) + 1
        """Highest id + 1. The model's rows above that are padding of its vocabulary."""

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """Of the whole vocabulary."""
        return max(len(text.encode()) for text in self._plain.get_vocab(with_added_tokens=True))

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens of ``text``, without tokenizing it.

        Its bytes divided by those of the longest token, and by four, because a normaliser may compose decomposed characters.
        """
        return len(text.encode(errors="replace")) // (4 * self.longest_token_bytes)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json and, where there is one, tokenizer_config.json.

        Raises:
            InvalidTokenizer: the message names the folder.
        """
        try:
            return cls((folder / "tokenizer.json").read_text(encoding="utf-8"), read_settings(folder))
        except (OSError, ValueError) as error:
            raise InvalidTokenizer(f"the tokenizer in {folder} cannot be used: {error}") from error

    @property
    def eos_id(self) -> int | None:
        """The id of ``eos_token``."""
        return self.id_of(self.named.get("eos_token"))

    @property
    def pad_id(self) -> int | None:
        """The id of ``pad_token``."""
        return self.id_of(self.named.get("pad_token"))

    def id_of(self, text: str | None) -> int | None:
        """The id of the token with exactly this text."""
        token: int | None = None if text is None else self._plain.token_to_id(text)
        return token

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The ids of a raw prompt. Recognises control tokens in it; ``add_special_tokens`` adds those that surround every text."""
        batch = self._with_control.encode_batch_fast([text], add_special_tokens=add_special_tokens)  # the only method that releases the GIL
        return tuple(batch[0].ids)

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in which control tokens are not recognised: their characters are encoded as text."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token, which may be part of a character. For an added token: the bytes of its text."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._find_bytes(token)
        return known

    def _find_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        text = self._plain.id_to_token(token)
        if text is None:
            return b""
        table = byte_of_character()
        return bytes(table[character] for character in text) if all(character in table for character in text) else text.encode()

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, without control tokens. Invalid bytes become U+FFFD."""
        return b"".join(self.token_bytes(token) for token in tokens if token not in self.special_ids).decode("utf-8", "replace")


def read_settings(folder: Path) -> dict[str, Any]:
    """The object in tokenizer_config.json; empty without the file."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not isinstance(settings, dict):
        raise InvalidTokenizer("tokenizer_config.json does not hold a JSON object")
    return settings


def _token_text(value: Any) -> str | None:
    """The text of a special token in tokenizer_config.json: a string, or an object with the string in ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None
