"""Guesses of a draft model, which lives where tokens are sampled: they come with one step's answer and go with the next step's plan."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

from engine.sequence import Sequence


class _Kept(NamedTuple):
    number: int | None
    num_tokens: int
    draft: tuple[int, ...]


class DraftModelProposer:
    """Keeps for each sequence what was guessed to come behind its known tokens."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Sequence, _Kept] = WeakKeyDictionary()

    def keep(self, sequence: Sequence, draft: tuple[int, ...]) -> None:
        """These were guessed to follow on all the tokens that are known now."""
        self._kept[sequence] = _Kept(sequence.number, len(sequence.tokens), draft)

    def propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """None to a sequence that was opened anew since: the draft model has not computed its guesses into its new blocks."""
        kept = self._kept.get(sequence)
        if kept is None or (kept.number, kept.num_tokens) != (sequence.number, len(sequence.tokens)):
            return ()
        return kept.draft[:most]
