"""Who guesses the next tokens of a sequence."""

from typing import Protocol

from engine.sequence import Sequence


class Proposer(Protocol):
    def propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Up to ``most`` tokens that may follow the known ones, or none. A wrong guess costs time and never changes an answer."""
        ...
