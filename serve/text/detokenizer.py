"""Token ids to text as they come, never half a character."""

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """What is needed of a `Tokenizer`."""

    special_ids: frozenset[int]

    def token_bytes(self, token: int) -> bytes: ...


class Detokenizer:
    """The text of one choice. All texts joined equal the decoding of all tokens at once."""

    def __init__(self, tokenizer: TokenBytes) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that ``token`` completes: none for a control token or the first bytes of a character."""
        return "" if token in self._tokenizer.special_ids else self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The end has come: U+FFFD where the last character is not complete."""
        return self._decoder.decode(b"", final=True)
