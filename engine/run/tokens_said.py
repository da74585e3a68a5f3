"""Step 9 of a request, where a step was planned before the one before it was answered: the rank fills in what it sampled itself, and
hands it on to those that compute with it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from engine.plan import COLUMN, NO_TOKEN, Decodes, Sampled, StepPlan
from parallel.collectives import broadcast
from parallel.groups import Group

SAMPLING_PLACE = 0
"""Of the rank that samples, in its tp group (`engine.run.runner.sampling_ranks`)."""


def hand_on(tokens_T: Tensor, tp: Group) -> None:
    """Write the tokens of the rank that samples over those of the ranks that compute with it; contiguous, on the device. Whether a step
    does so follows from its plan, so that all of them do."""
    assert tokens_T.is_contiguous()
    broadcast(tokens_T, SAMPLING_PLACE, tp)


def num_with_unknown_tokens(plan: StepPlan, shard: int) -> int:
    """The decodes of a shard, where the token of one of them was not known when they were planned; else 0. They are the first of its works
    and of the tokens in its batch."""
    columns = plan.decodes.columns
    tokens = columns[2, columns[4] == shard]
    return len(tokens) if (tokens == NO_TOKEN).any() else 0


def with_known_tokens(plan: StepPlan, said: Mapping[int, int]) -> StepPlan:
    """The plan with a token wherever it has `NO_TOKEN`. A sequence that got none in the step before gets any: nobody will ask for more."""
    columns = plan.decodes.columns if len(plan.decodes) else None
    if columns is None or not (columns[2] == NO_TOKEN).any():
        return plan
    known = columns.copy()
    for at in np.flatnonzero(columns[2] == NO_TOKEN).tolist():
        known[2, at] = said.get(int(columns[0, at]), 0)
    return replace(plan, decodes=Decodes.of(known))


def remember(said: dict[int, int], decodes: Decodes, tokens: bytes, rest: Iterable[Sampled]) -> None:
    """Note what a step gave: ``tokens`` as `StepResult.tokens` has them, and the rest."""
    if tokens:
        columns, sampled = decodes.columns, np.frombuffer(tokens, COLUMN)
        some = np.flatnonzero(sampled != NO_TOKEN)
        said.update(zip(columns[0, some].tolist(), sampled[some].tolist(), strict=True))
    said.update((answer.sequence, answer.tokens[-1]) for answer in rest if answer.tokens)
