"""Drafts from a draft model on the ranks that sample: they arrive with the result of one step and go out with the plan of the next."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

from engine.sequence import Sequence


class _Stored(NamedTuple):
    number: int | None
    num_tokens: int
    draft: tuple[int, ...]


class DraftModelProposer:
    """A `Proposer` that keeps, for each sequence, what the draft model proposed last."""

    def __init__(self) -> None:
        self._stored: WeakKeyDictionary[Sequence, _Stored] = WeakKeyDictionary()

    def store(self, sequence: Sequence, draft: tuple[int, ...]) -> None:
        """Keep a draft that follows all tokens known now."""
        self._stored[sequence] = _Stored(sequence.number, len(sequence.tokens), draft)

    def propose(self, sequence: Sequence, max_tokens: int) -> tuple[int, ...]:
        """The stored draft. Nothing if the sequence was reopened since: the draft model has no KV of the draft in its new blocks."""
        stored = self._stored.get(sequence)
        if stored is None or (stored.number, stored.num_tokens) != (sequence.number, len(sequence.tokens)):
            return ()
        return stored.draft[:max_tokens]
