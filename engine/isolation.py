"""Step 7 of a request, after a loss of the workers: whoever was in the lost step is tried alone before it may run with others.

What ends the workers is mostly one request; tried alone it can end them only once more, and only at its own cost.
"""

from collections.abc import Iterable

from engine.policy import Policy
from engine.sequence import ISOLATION_TOKENS, Sequence

MAX_LOSSES_ALONE = 2
"""A request that was in the lost steps of so many losses, alone in the last of them, is what ended the workers: where a process was killed
from outside this is no proof, since of two faults within seconds the second meets whoever is just being tried."""
MAX_LOSSES = 3
"""A request in so many lost steps is not tried again, alone or not."""


def next_suspect(sequences: Iterable[Sequence], policy: Policy) -> Sequence | None:
    """The suspect to be tried now: one that was begun, else the first in rank."""
    suspects = [sequence for sequence in sequences if sequence.isolation_tokens_left]
    return min(suspects, key=lambda suspect: (suspect.number is None, policy.rank(suspect)), default=None)


def record_loss(sequences: Iterable[Sequence], *, from_outside: bool) -> list[Sequence]:
    """Note a loss with all that were in the lost step; those that are not to be tried again. ``from_outside``: see `WorkersLost`."""
    accused = [sequence for sequence in sequences if sequence.in_flight]
    for sequence in accused:
        sequence.losses += 1
        sequence.isolation_tokens_left = ISOLATION_TOKENS
    limit = MAX_LOSSES_ALONE if len(accused) == 1 and not from_outside else MAX_LOSSES
    return [sequence for sequence in accused if sequence.losses >= limit]
