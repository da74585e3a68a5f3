"""Place 7 of a request, after workers were lost: every sequence of the lost step must run alone before it may run with others again.

Usually one request is what ends the workers. Running alone it can end them only once more, and only at its own cost.
"""

from collections.abc import Iterable

from engine.policy import Policy
from engine.sequence import ISOLATION_TOKENS, Sequence

MAX_LOSSES_ALONE = 2
"""A request with this many losses that was alone in the last of them is what ended the workers. This is no proof if a process was killed
from outside: the second of two faults within seconds hits whichever request is running alone just then."""
MAX_LOSSES = 3
"""A request with this many losses is not tried again, whether it was alone or not."""


def next_suspect(sequences: Iterable[Sequence], policy: Policy) -> Sequence | None:
    """The suspect to run now: one that is open already, otherwise the first in the policy's order."""
    suspects = [sequence for sequence in sequences if sequence.isolation_tokens_left]
    return min(suspects, key=lambda suspect: (suspect.number is None, policy.sort_key(suspect)), default=None)


def record_loss(sequences: Iterable[Sequence], *, from_outside: bool) -> list[Sequence]:
    """Count a loss for every sequence in flight, and return those that must not be tried again. ``from_outside``: see `WorkersLost`."""
    suspects = [sequence for sequence in sequences if sequence.in_flight]
    for sequence in suspects:
        sequence.losses += 1
        sequence.isolation_tokens_left = ISOLATION_TOKENS
    limit = MAX_LOSSES_ALONE if len(suspects) == 1 and not from_outside else MAX_LOSSES
    return [sequence for sequence in suspects if sequence.losses >= limit]
