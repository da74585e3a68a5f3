"""How many tokens it pays to guess."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from engine.draft.draft_model import DraftModelProposer
from engine.draft.proposer import Proposer
from engine.sequence import Sequence

PRIOR_HELD = 1.0
PRIOR_TRIED = 2.0
"""What is thought of a sequence's guesses before the first: every other one holds."""
MEMORY = 0.9
"""How much a draft before the last counts against the last."""
FORGIVENESS = 0.97
"""A sequence for which guessing did not pay is thought a little better of at every step without, and tried again."""

RESTING_CHANCE, WAKING_CHANCE = 0.9, 0.8
"""Where not even guesses that hold with the first would pay nobody is guessed for, until those would that hold with the second."""
PASS_SMOOTHING = 0.1
"""How much of what a pass of the draft model takes is thought by the last one."""

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

    Where the ranks have a draft model (`DraftModelProposer`) they are asked for guesses a step ahead, and each of them costs a pass of it.
    """

    def __init__(self, proposer: Proposer, *, max_tokens: int, step_line: StepLine) -> None:
        self._proposer, self._max_tokens, self._step_line = proposer, max_tokens, step_line
        self._told_by_ranks = proposer if isinstance(proposer, DraftModelProposer) else None
        self._pass_s = 0.0
        self.is_resting = False
        """Whether nobody is guessed for, as steps are busy enough."""
        self._records: WeakKeyDictionary[Sequence, _Record] = WeakKeyDictionary()
        self.num_drafted = self.num_accepted = 0
        """Guessed tokens that steps computed, and those of them that were right."""

    def draft(self, sequence: Sequence, *, room: int, num_sequences: int) -> tuple[int, ...]:
        """Up to ``room`` guessed tokens for a step that ``num_sequences`` take part in."""
        length = self.length(sequence, room=room, num_sequences=num_sequences)
        guessed = self._proposer.propose(sequence, length) if length > 0 else ()
        if not guessed:
            self._records[sequence].fade(FORGIVENESS)
        return guessed

    def length(self, sequence: Sequence, *, room: int, num_sequences: int) -> int:
        """How many guesses are worth their time, of ``room`` at most."""
        record = self._records.setdefault(sequence, _Record())
        if self.is_resting:
            return 0
        return worthwhile_length(record.chance, min(room, self._max_tokens), num_sequences, self._step_line(), self._pass_s)

    def rest_or_wake(self, num_sequences: int) -> None:
        """Rest or not, before a step of so many sequences is planned."""
        chance = WAKING_CHANCE if self.is_resting else RESTING_CHANCE
        self.is_resting = worthwhile_length(chance, self._max_tokens, num_sequences, self._step_line(), self._pass_s) == 0

    @property
    def asks_ranks(self) -> bool:
        """Whether guesses come from a draft model on the ranks."""
        return self._told_by_ranks is not None

    def told(self, sequence: Sequence, guesses: tuple[int, ...]) -> None:
        """What the ranks guess behind all that is known of it now."""
        assert self._told_by_ranks is not None
        self._told_by_ranks.keep(sequence, guesses)

    def note_guessing(self, num_passes: int, seconds: float) -> None:
        """So many passes of the ranks' draft model, beyond the one that reads what is new, took so long."""
        if num_passes > 0:
            self._pass_s += (seconds / num_passes - self._pass_s) * (PASS_SMOOTHING if self._pass_s else 1.0)

    def judge(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Of so many guessed tokens so many held."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        record = self._records.setdefault(sequence, _Record())
        record.fade(MEMORY)
        record.held += num_accepted
        record.tried += min(num_accepted + 1, num_drafted)  # what comes after the first wrong one was not put to the test


def worthwhile_length(chance: float, most: int, num_sequences: int, step_line: tuple[float, float], pass_s: float = 0.0) -> int:
    """How many guesses yield most tokens per second. Of the step's own cost a sequence bears its part, and of ``pass_s``, which each
    guess costs beyond the first."""
    base_s, token_s = step_line
    base_s /= max(num_sequences, 1)
    pass_s /= max(num_sequences, 1)
    best, best_rate = 0, 0.0
    expected, power = 1.0, 1.0
    for length in range(most + 1):
        rate = expected / max(base_s + (1 + length) * token_s + max(length - 1, 0) * pass_s, 1e-9)
        if rate > best_rate:
            best, best_rate = length, rate
        power *= chance
        expected += power
    return best
