"""The interface for grammars, which restrict what may be sampled (structured output)."""

from collections.abc import Sequence
from typing import Protocol


class Grammar(Protocol):
    """The grammar state of one answer: a function of its tokens and of nothing else.

    A sequence that is reopened (after preemption, on new workers, on another replica) feeds its tokens to a new one.
    """

    def accept(self, tokens: Sequence[int]) -> int:
        """Advance by these tokens. Returns how many of them fit; the first that does not, and all after it, change nothing."""
        ...

    def roll_back(self, num_tokens: int) -> None:
        """Take back the tokens accepted last: rejected draft tokens."""
        ...

    def mask(self) -> bytes:
        """One bit per token id, starting with the lowest bit of the first byte: 1 if the text may continue with that token.

        A grammar may allow control tokens; the sampler ignores that.

        Raises:
            GrammarFailed: no token is allowed, or finding one exceeds the cost limits.
        """
        ...

    @property
    def may_end(self) -> bool:
        """Whether the text is complete as it is, as of the last `mask`."""
        ...


class GrammarCompiler(Protocol):
    """Makes grammars for one vocabulary. Thread-safe."""

    def compile(self, source: str) -> Grammar:
        """A grammar in its initial state. ``source`` is Lark, in the dialect of llguidance.

        Raises:
            GrammarFailed: the source is invalid or too large to compile.
        """
        ...
