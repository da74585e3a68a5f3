"""Keeps what people write from becoming control tokens, whatever a chat template does with it.

A client's text that contains a control token, or a piece of one that template text could complete, goes through the template
in disguise: every character that any control token is made of is exchanged for a private-use character that occurs nowhere
else. So each control token in the rendered text was written by the template alone. The text is split there, and only then
are the characters exchanged back.

Other texts are left alone, because templates may look into them (trim them, search them for a closing tag).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

PRIVATE_USE = (range(0x10_0000, 0x10_FFFE), range(0xF_0000, 0xF_FFFE), range(0xE000, 0xF900))


class TooManyPrivateCharacters(ValueError):
    """A text uses up nearly all private-use characters, so that none are left for the disguise."""


class ControlWords:
    """The control tokens as texts, and which other texts could become one."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = tuple(words)
        self.alphabet = "".join(sorted(set("".join(self._words))))
        spans = [(word, start, stop) for word in self._words for start in range(len(word)) for stop in range(start + 1, len(word) + 1)]
        self._beginnings = {word[:stop] for word, start, stop in spans if start == 0}
        self._endings = {word[start:] for word, start, stop in spans if stop == len(word)}
        self._pieces = {word[start:stop] for word, start, stop in spans}
        self._longest = max(map(len, self._words), default=0)

    def threatened_by(self, text: str) -> bool:
        """Whether ``text``, with any text around it, could hold a control token that is not wholly of that other text.

        Also true if that holds for the text without the white space around it, which templates like to trim.
        """
        return any(word in text for word in self._words) or self._could_join(text) or self._could_join(text.strip())

    def _could_join(self, text: str) -> bool:
        lengths = range(1, min(self._longest, len(text)) + 1)
        return text in self._pieces or any(text[-k:] in self._beginnings or text[:k] in self._endings for k in lengths)


class Disguise:
    """The exchange of characters for one request."""

    def __init__(self, words: ControlWords, values: Any, *, others: str = "") -> None:
        """``values``: everything in it will be put on; ``others``: what else the rendered text may be made of.

        Raises:
            TooManyPrivateCharacters: see there.
        """
        self._words = words
        self._exchange: dict[int, int] = {}
        texts = list(_texts_in(values))
        if any(map(words.threatened_by, texts)):
            self._exchange = dict(zip(map(ord, words.alphabet), _unused({*others}.union(*texts), len(words.alphabet)), strict=True))
        self._back = {put: original for original, put in self._exchange.items()}

    def put_on(self, value: Any) -> Any:
        """``value`` with every threatened text in it disguised, however deep in lists and mappings (keys too)."""
        if not self._exchange:
            return value
        if isinstance(value, str):
            return value.translate(self._exchange) if self._words.threatened_by(value) else value
        if isinstance(value, Mapping):
            return {self.put_on(key): self.put_on(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.put_on(item) for item in value]
        return value

    def take_off(self, text: str) -> str:
        return text.translate(self._back) if self._back else text


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts_in(key)
            yield from _texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)


def _unused(used: set[str], count: int) -> list[int]:
    free = (point for points in PRIVATE_USE for point in points if chr(point) not in used)
    chosen = list(itertools.islice(free, count))
    if len(chosen) < count:
        raise TooManyPrivateCharacters("the text holds nearly all private-use characters of Unicode")
    return chosen
