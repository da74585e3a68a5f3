"""Step 7 of a request, after a loss of the workers: whoever was in the lost step is tried alone before it may run with others.

What ends the workers is mostly one request; tried alone it can end them only twice more, and no other is in the lost step.
"""

from collections.abc import Iterable

from engine.policy import Policy
from engine.sequence import TRIAL_TOKENS, Sequence

MAX_LOSSES = 3
"""A request in so many lost steps is not tried again. Two are no proof, though it was alone in the second: where two faults strike within
seconds, the second one meets whoever is just being tried."""


def next_trial(sequences: Iterable[Sequence], policy: Policy) -> Sequence | None:
    """The suspect to be tried now: one that was begun, else the first in rank."""
    suspects = [sequence for sequence in sequences if sequence.trial_left]
    return min(suspects, key=lambda suspect: (suspect.number is None, policy.rank(suspect)), default=None)


def accuse(sequences: Iterable[Sequence]) -> list[Sequence]:
    """Note a loss with all that were in the lost step; those that are not to be tried again."""
    accused = [sequence for sequence in sequences if sequence.in_flight]
    for sequence in accused:
        sequence.losses += 1
        sequence.trial_left = TRIAL_TOKENS
    return [sequence for sequence in accused if sequence.losses >= MAX_LOSSES]
