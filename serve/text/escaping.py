"""Escapes what clients write, so that it never becomes a control token, whatever a chat template does with it.

A client's text that contains a control token, or a part of one that the template's text could complete, is escaped before rendering:
every character that occurs in any control token is replaced by a private-use character that occurs nowhere else. So every control
token in the rendered text comes from the template alone. The text is split there, and only then unescaped.

Other texts are left as they are, because templates may look into them (trim them, search them for a closing tag).
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

PRIVATE_USE = (range(0x10_0000, 0x10_FFFE), range(0xF_0000, 0xF_FFFE), range(0xE000, 0xF900))


class TooManyPrivateCharacters(ValueError):
    """The text uses nearly all private-use characters, so too few are left for escaping."""


class ControlTokens:
    """The texts of the control tokens, and which other texts could become one."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = tuple(texts)
        self.alphabet = "".join(sorted(set("".join(self._texts))))
        spans = [(word, start, stop) for word in self._texts for start in range(len(word)) for stop in range(start + 1, len(word) + 1)]
        self._beginnings = {word[:stop] for word, start, stop in spans if start == 0}
        self._endings = {word[start:] for word, start, stop in spans if stop == len(word)}
        self._pieces = {word[start:stop] for word, start, stop in spans}
        self._longest = max(map(len, self._texts), default=0)

    def needs_escaping(self, text: str) -> bool:
        """Whether ``text``, with any text around it, could contain a control token that is not entirely in the other text.

        Also true if that holds after trimming white space, which templates often do.
        """
        return any(word in text for word in self._texts) or self._could_join(text) or self._could_join(text.strip())

    def _could_join(self, text: str) -> bool:
        lengths = range(1, min(self._longest, len(text)) + 1)
        return text in self._pieces or any(text[-k:] in self._beginnings or text[:k] in self._endings for k in lengths)


class Escaper:
    """Escapes and unescapes the texts of one request."""

    def __init__(self, control_tokens: ControlTokens, values: Any, *, others: str = "") -> None:
        """``values``: everything that will be escaped. ``others``: the other text that the rendered text may contain.

        Raises:
            TooManyPrivateCharacters: too few private-use characters are unused.
        """
        self._control_tokens = control_tokens
        self._replacements: dict[int, int] = {}
        texts = list(_texts_in(values))
        if any(map(control_tokens.needs_escaping, texts)):
            self._replacements = dict(
                zip(map(ord, control_tokens.alphabet), _unused({*others}.union(*texts), len(control_tokens.alphabet)), strict=True)
            )
        self._originals = {replacement: original for original, replacement in self._replacements.items()}

    def escape(self, value: Any) -> Any:
        """``value`` with every string in it escaped that needs it, at any depth of lists and mappings (keys too)."""
        if not self._replacements:
            return value
        if isinstance(value, str):
            return value.translate(self._replacements) if self._control_tokens.needs_escaping(value) else value
        if isinstance(value, Mapping):
            return {self.escape(key): self.escape(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape(item) for item in value]
        return value

    def unescape(self, text: str) -> str:
        return text.translate(self._originals) if self._originals else text


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
