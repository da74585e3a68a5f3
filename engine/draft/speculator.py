"""How many tokens it pays to guess."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from engine.draft.proposer import Proposer
from engine.sequence import Sequence

PRIOR_HELD = 1.0
PRIOR_TRIED = 2.0
"""What is thought of a sequence's guesses before the first: every other one holds."""
MEMORY = 0.9
"""How much a draft before the last counts against the last."""
FORGIVENESS = 0.97
"""A sequence for which guessing did not pay is thought a little better of at every step without, and tried again."""

StepLine = Callable[[], tuple[float, float]]
"""``(base_s, token_s)``: what a step costs by itself and for each of its tokens, as measured (`engine.step_cost`)."""


@dataclass
class _Record:
    """How many of a sequence's guessed tokens were tried, and held."""

    held: float = 0.0
    tried: float = 0.0

    @property
    def chance(self) -> float:
        """Of one more guess to hold after those before it have."""
        return (self.held + PRIOR_HELD) / (self.tried + PRIOR_TRIED)

    def fade(self, factor: float) -> None:
        self.held *= factor
        self.tried *= factor


class Speculator:
    """Asks a proposer for as many tokens as are worth their time.

    A step that computes d guessed tokens of a sequence costs d tokens more and yields, if each holds with chance p, p + p^2 + .. + p^d
    tokens more. The length that yields most per second is taken, which is none where a step is busy with many sequences already.
    """

    def __init__(self, proposer: Proposer, *, max_tokens: int, step_line: StepLine) -> None:
        self._proposer, self._max_tokens, self._step_line = proposer, max_tokens, step_line
        self._records: WeakKeyDictionary[Sequence, _Record] = WeakKeyDictionary()
        self.num_drafted = self.num_held = 0
        """Guessed tokens that steps computed, and those of them that were right."""

    def draft(self, sequence: Sequence, *, room: int, num_sequences: int) -> tuple[int, ...]:
        """Up to ``room`` guessed tokens for a step that ``num_sequences`` take part in."""
        record = self._records.setdefault(sequence, _Record())
        length = worthwhile_length(record.chance, min(room, self._max_tokens), num_sequences, self._step_line())
        guessed = self._proposer.propose(sequence, length) if length > 0 else ()
        if not guessed:
            record.fade(FORGIVENESS)
        return guessed

    def judge(self, sequence: Sequence, num_drafted: int, num_held: int) -> None:
        """Of so many guessed tokens so many held."""
        self.num_drafted += num_drafted
        self.num_held += num_held
        record = self._records.setdefault(sequence, _Record())
        record.fade(MEMORY)
        record.held += num_held
        record.tried += min(num_held + 1, num_drafted)  # what comes after the first wrong one was not put to the test


def worthwhile_length(chance: float, most: int, num_sequences: int, step_line: tuple[float, float]) -> int:
    """How many guesses yield most tokens per second. Of the step's own cost a sequence bears its part."""
    base_s, token_s = step_line
    base_s /= max(num_sequences, 1)
    best, best_rate = 0, 0.0
    expected, power = 1.0, 1.0
    for length in range(most + 1):
        rate = expected / max(base_s + (1 + length) * token_s, 1e-9)
        if rate > best_rate:
            best, best_rate = length, rate
        power *= chance
        expected += power
    return best
