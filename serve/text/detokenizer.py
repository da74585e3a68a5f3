"""Streaming conversion of token ids to text, in whole characters."""

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a `Tokenizer` that is used here."""

    special_ids: frozenset[int]

    def token_bytes(self, token: int) -> bytes: ...


class Detokenizer:
    """Decodes the tokens of one choice. The returned texts, joined, equal the decoding of all tokens at once."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that ``token`` completes; "" for a control token or the first bytes of a character."""
        return "" if token in self._tokenizer.special_ids else self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """At the end: U+FFFD if the last character is incomplete."""
        return self._decoder.decode(b"", final=True)
