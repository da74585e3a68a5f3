"""The seam between choosing tokens and what the text of an answer may become."""

from collections.abc import Sequence
from typing import Protocol


class Grammar(Protocol):
    """What one answer may still become: a function of its tokens, and of nothing else.

    A sequence that comes back (after preemption, on new workers, on another replica) shows its tokens to a new one.
    """

    def accept(self, tokens: Sequence[int]) -> int:
        """Go on by these tokens. How many of them fitted; the first that does not, and all behind it, change nothing."""
        ...

    def roll_back(self, num_tokens: int) -> None:
        """Take back the tokens accepted last: drafts that were not kept."""
        ...

    def mask(self) -> bytes:
        """A bit for each id, lowest bit of the first byte first: 1 where the text may go on with it.

        A grammar may ask for control tokens; whoever samples passes over that.

        Raises:
            GrammarFailed: there is no way on, or looking for one costs more than its limits allow.
        """
        ...

    @property
    def may_end(self) -> bool:
        """Whether the text is whole as it is. As of the last `mask`."""
        ...


class GrammarCompiler(Protocol):
    """Makes grammars for one vocabulary. May be asked from several threads."""

    def compile(self, source: str) -> Grammar:
        """A grammar at its beginning; ``source`` is Lark, in the dialect of llguidance.

        Raises:
            GrammarFailed: the source is wrong, or too large to be compiled.
        """
        ...
