"""Who guesses the next tokens of a sequence."""

from typing import Protocol

from engine.sequence import Sequence


class Proposer(Protocol):
    """Implementations: `engine.draft.lookup`, from the sequence's own tokens, and `engine.draft.draft_model`, from a draft model."""

    def propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens that may follow the known ones, or none. A wrong guess costs time and never changes an answer."""
        ...
