"""A small vocabulary, and the reference for grammars: every id is tried with the `regex` library's partial matching."""

import regex

from model.vocabulary import Vocabulary

END = 0
TOKENS = (
    *(b"<|end|>", b"<|start|>"),
    *(bytes([byte]) for byte in range(256)),
    *(b"ab", b"abc", b"aa", b'{"', b'":', b": ", b"12", b"true", b"\n\n", b" b", b"b,", b"ba"),
    *("é".encode(), "你好".encode(), "你".encode()[:2], b"<|end|>x"),
)
VOCABULARY = Vocabulary(tokens=TOKENS, special_ids=frozenset({0, 1}))


def ids(text: str) -> list[int]:
    """A text byte by byte."""
    return [byte + 2 for byte in text.encode()]


class SlowGrammar:
    """An `engine.grammar.Grammar` for a regular expression over bytes, by trying each id."""

    def __init__(self, pattern: bytes) -> None:
        self._pattern, self._tokens = regex.compile(pattern, regex.DOTALL), []

    def accept(self, tokens) -> int:
        for number, token in enumerate(tokens):
            if not self._fits(token):
                return number
            self._tokens.append(token)
        return len(tokens)

    def roll_back(self, num_tokens: int) -> None:
        del self._tokens[len(self._tokens) - num_tokens :]

    def mask(self) -> bytes:
        bits = sum(1 << token for token in range(len(TOKENS)) if self._fits(token))
        return bits.to_bytes(-(-len(TOKENS) // 32) * 4, "little")

    @property
    def may_end(self) -> bool:
        return self._pattern.fullmatch(self._text()) is not None

    def _fits(self, token: int) -> bool:
        if token in VOCABULARY.special_ids:
            return False
        return self._pattern.fullmatch(self._text() + TOKENS[token], partial=True) is not None

    def _text(self) -> bytes:
        return b"".join(TOKENS[token] for token in self._tokens)
