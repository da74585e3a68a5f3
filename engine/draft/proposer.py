"""The interface of whatever proposes draft tokens."""

from typing import Protocol

from engine.sequence import Sequence


class Proposer(Protocol):
    """Implementations: `engine.draft.lookup` (from the sequence's own tokens) and `engine.draft.draft_model`."""

    def propose(self, sequence: Sequence, max_tokens: int) -> tuple[int, ...]:
        """Up to ``max_tokens`` tokens that may follow the known ones, or none. A wrong one costs time and never changes an answer."""
        ...
