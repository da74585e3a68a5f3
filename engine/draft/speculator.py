"""Decides how many draft tokens pay off."""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from engine.draft.draft_model import DraftModelProposer
from engine.draft.proposer import Proposer
from engine.sequence import Sequence

PRIOR_ACCEPTED = 1.0
PRIOR_TRIED = 2.0
"""The assumption about a sequence before its first draft: every other draft token is accepted."""
HISTORY_DECAY = 0.9
"""Weight of the drafts before the last one, relative to the last."""
IDLE_DECAY = 0.97
"""At every step without a draft a sequence's record is multiplied by this, so that a sequence with a bad record gets a draft again."""

PAUSE_PROBABILITY, RESUME_PROBABILITY = 0.9, 0.8
"""Drafting pauses for all sequences when not even an acceptance probability of 0.9 would pay, and resumes when 0.8 would."""
PASS_SMOOTHING = 0.1
"""Weight of the last step in the smoothed time of a draft model pass."""

StepLine = Callable[[], tuple[float, float]]
"""Returns ``(base_s, token_s)``: the measured cost of a step and of each token in it, in seconds (`engine.step_cost`)."""


@dataclass
class _Record:
    """How many draft tokens of a sequence were tried, and how many of those were accepted. Older drafts weigh less."""

    accepted: float = 0.0
    tried: float = 0.0

    @property
    def acceptance(self) -> float:
        """Probability that a draft token is accepted if all before it were."""
        return (self.accepted + PRIOR_ACCEPTED) / (self.tried + PRIOR_TRIED)

    def fade(self, factor: float) -> None:
        self.accepted *= factor
        self.tried *= factor


class Speculator:
    """Gets from a proposer as many draft tokens as are worth their time.

    A step that computes d draft tokens of a sequence costs d tokens more and yields p + p^2 + .. + p^d tokens more, if each is accepted
    with probability p. The length with the most tokens per second is chosen, which is 0 where the step is busy with many sequences.

    A draft model (`DraftModelProposer`) is asked for its proposals one step ahead, and each of them costs a pass of that model.
    """

    def __init__(self, proposer: Proposer, *, max_tokens: int, step_line: StepLine) -> None:
        self._proposer, self._max_tokens, self._step_line = proposer, max_tokens, step_line
        self._draft_model = proposer if isinstance(proposer, DraftModelProposer) else None
        self._pass_s = 0.0
        self.is_paused = False
        """Whether steps are too busy for any drafts."""
        self._records: WeakKeyDictionary[Sequence, _Record] = WeakKeyDictionary()
        self.num_drafted = self.num_accepted = 0
        """Draft tokens that steps computed, and those of them that were accepted."""

    def draft(self, sequence: Sequence, *, room: int, num_sequences: int) -> tuple[int, ...]:
        """At most ``room`` draft tokens, for a step with ``num_sequences`` sequences."""
        length = self.draft_length(sequence, room=room, num_sequences=num_sequences)
        draft = self._proposer.propose(sequence, length) if length > 0 else ()
        if not draft:
            self._records[sequence].fade(IDLE_DECAY)
        return draft

    def draft_length(self, sequence: Sequence, *, room: int, num_sequences: int) -> int:
        """How many draft tokens are worth their time, at most ``room``."""
        record = self._records.setdefault(sequence, _Record())
        if self.is_paused:
            return 0
        return best_draft_length(record.acceptance, min(room, self._max_tokens), num_sequences, self._step_line(), self._pass_s)

    def update_pause(self, num_sequences: int) -> None:
        """Pause or resume drafting, before a step with ``num_sequences`` is planned."""
        probability = RESUME_PROBABILITY if self.is_paused else PAUSE_PROBABILITY
        self.is_paused = best_draft_length(probability, self._max_tokens, num_sequences, self._step_line(), self._pass_s) == 0

    @property
    def uses_draft_model(self) -> bool:
        """Whether drafts come from a draft model on the ranks."""
        return self._draft_model is not None

    def store_draft(self, sequence: Sequence, draft: tuple[int, ...]) -> None:
        """Keep what the ranks' draft model proposed to follow all known tokens."""
        assert self._draft_model is not None
        self._draft_model.store(sequence, draft)

    def note_draft_passes(self, num_passes: int, seconds: float) -> None:
        """Record the time of the draft model's passes in a step, not counting the first, which reads what is new."""
        if num_passes > 0:
            self._pass_s += (seconds / num_passes - self._pass_s) * (PASS_SMOOTHING if self._pass_s else 1.0)

    def note_verified(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Record how many tokens of a draft were accepted."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        record = self._records.setdefault(sequence, _Record())
        record.fade(HISTORY_DECAY)
        record.accepted += num_accepted
        record.tried += min(num_accepted + 1, num_drafted)  # tokens behind the first wrong one were not put to the test


def best_draft_length(acceptance: float, max_length: int, num_sequences: int, step_line: tuple[float, float], pass_s: float = 0.0) -> int:
    """The draft length that yields most tokens per second.

    The sequence bears its part of the step's own cost, and of ``pass_s``, the cost of a draft model pass for each token but the first.
    """
    base_s, token_s = step_line
    base_s /= max(num_sequences, 1)
    pass_s /= max(num_sequences, 1)
    best, best_rate = 0, 0.0
    expected, power = 1.0, 1.0
    for length in range(max_length + 1):
        rate = expected / max(base_s + (1 + length) * token_s + max(length - 1, 0) * pass_s, 1e-9)
        if rate > best_rate:
            best, best_rate = length, rate
        power *= acceptance
        expected += power
    return best
