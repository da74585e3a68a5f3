"""Prompt lookup: propose what followed the last few tokens when they occurred before (github.com/apoorvumang/prompt-lookup-decoding).

It pays where answers repeat earlier text: edited code, summaries, quotes, JSON, tables.
"""

from array import array
from weakref import WeakKeyDictionary

from engine.sequence import Sequence

INT = "i"
WIDTH = array(INT).itemsize


class PromptLookup:
    """A `Proposer`. Finds the last earlier occurrence of the longest possible suffix of the known tokens.

    Suffixes have at most `longest` and at least `shortest` tokens.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"endings of {shortest} to {longest} tokens cannot be looked for")
        self._longest, self._shortest = longest, shortest
        self._bytes: WeakKeyDictionary[Sequence, bytearray] = WeakKeyDictionary()
        """The tokens of each sequence as bytes, which `bytearray.rfind` searches at memory speed."""

    def propose(self, sequence: Sequence, max_tokens: int) -> tuple[int, ...]:
        known = self._bytes.setdefault(sequence, bytearray())
        known += array(INT, sequence.tokens[len(known) // WIDTH :]).tobytes()
        for length in range(self._longest, self._shortest - 1, -1):
            start = _find_continuation(known, length)
            if start is not None:
                return _continue_from(start, sequence.tokens, max_tokens)
        return ()


def _find_continuation(known: bytearray, length: int) -> int | None:
    """The index of the token behind the last earlier occurrence of the final ``length`` tokens, or None."""
    suffix, stop = bytes(known[-length * WIDTH :]), len(known) - 1
    if len(suffix) < length * WIDTH:
        return None
    while (at := known.rfind(suffix, 0, stop)) >= 0:
        if at % WIDTH == 0:
            return at // WIDTH + length
        stop = at + len(suffix) - 1  # a match across token boundaries
    return None


def _continue_from(start: int, tokens: list[int], max_tokens: int) -> tuple[int, ...]:
    """``max_tokens`` tokens from ``start`` on. Past the end of the known tokens the draft continues with itself, as a repetition does."""
    draft: list[int] = []
    while len(draft) < max_tokens:
        at = start + len(draft)
        draft.append(tokens[at] if at < len(tokens) else draft[at - len(tokens)])
    return tuple(draft)
