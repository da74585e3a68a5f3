"""Prompt lookup: what followed the last few tokens when they stood there before (github.com/apoorvumang/prompt-lookup-decoding).

It pays where answers repeat what was said: code that is edited, text that is summarised or quoted, JSON, tables.
"""

from array import array
from weakref import WeakKeyDictionary

from engine.sequence import Sequence


class PromptLookup:
    """Looks for the longest ending of the known tokens, of at most `longest` and at least `shortest`, at its last place before the end."""

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"endings of {shortest} to {longest} tokens cannot be looked for")
        self._longest, self._shortest = longest, shortest
        self._known: WeakKeyDictionary[Sequence, bytearray] = WeakKeyDictionary()
        """The tokens of each sequence as bytes, in which the interpreter searches at the speed of memory."""

    def propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        known = self._known.setdefault(sequence, bytearray())
        known += array(INT, sequence.tokens[len(known) // WIDTH :]).tobytes()
        for length in range(self._longest, self._shortest - 1, -1):
            behind = _last_place_before_the_end(known, length)
            if behind is not None:
                return _continued(sequence.tokens, behind, most)
        return ()


INT = "i"
WIDTH = array(INT).itemsize


def _last_place_before_the_end(known: bytearray, length: int) -> int | None:
    """The index of the token behind the last earlier occurrence of the final ``length`` tokens; None if there is no such."""
    ending, stop = bytes(known[-length * WIDTH :]), len(known) - 1
    if len(ending) < length * WIDTH:
        return None
    while (at := known.rfind(ending, 0, stop)) >= 0:
        if at % WIDTH == 0:
            return at // WIDTH + length
        stop = at + len(ending) - 1  # the bytes of two neighbours, by chance
    return None


def _continued(tokens: list[int], behind: int, most: int) -> tuple[int, ...]:
    """What stands from ``behind`` on; beyond the end the guess goes on with itself, as a repetition does."""
    draft: list[int] = []
    while len(draft) < most:
        at = behind + len(draft)
        draft.append(tokens[at] if at < len(tokens) else draft[at - len(tokens)])
    return tuple(draft)
