"""Step 9 of a request, where a step was planned before the one before it was answered: the rank fills in what it sampled itself, and
hands it on to those that compute with it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.plan import COLUMN, NO_TOKEN, Decodes, Sampled, StepPlan
from parallel.collectives import broadcast
from parallel.groups import Group

SAMPLING_TP_RANK = 0
"""Of the rank that samples, in its tp group (`engine.run.runner.sampling_ranks`)."""


def broadcast_tokens(tokens_T: Tensor, tp: Group) -> None:
    """Write the tokens of the rank that samples over those of the ranks that compute with it; contiguous, on the device. Whether a step
    does so follows from its plan, so that all of them do."""
    assert tokens_T.is_contiguous()
    broadcast(tokens_T, SAMPLING_TP_RANK, tp)


def fill_unknown_tokens(tokens_T: Tensor, report: Tensor) -> None:
    """Whatever is below 0 stands in the report of the step before: -1 - n at place n. All on the device, int64."""
    tokens_T.copy_(torch.where(tokens_T < 0, report[(-1 - tokens_T).clamp(min=0)], tokens_T))


def num_decodes_to_broadcast(plan: StepPlan, shard: int) -> int:
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


class LastTokens(Mapping[int, int]):
    """Of each open sequence the token that was sampled last. Columns are kept as they came until somebody asks for a token: in most steps
    nobody does, as the next one takes it where it lies on the device."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self._news: tuple[np.ndarray, np.ndarray] | None = None
        """Sequences, and their tokens, that are newer."""

    def note(self, decodes: Decodes, tokens: bytes, rest: Iterable[Sampled]) -> None:
        """What a step gave: ``tokens`` as `StepResult.tokens` has them, and the rest."""
        if tokens:
            sequences, sampled = decodes.columns[0], np.frombuffer(tokens, COLUMN)
            if sampled.min() == NO_TOKEN:
                some = sampled != NO_TOKEN
                sequences, sampled = sequences[some], sampled[some]
            if self._news is not None and not np.array_equal(self._news[0], sequences):
                self._read_news()
            self._news = (sequences, sampled)
        if rest:
            self._read_news()
            self._tokens.update((answer.sequence, answer.tokens[-1]) for answer in rest if answer.tokens)

    def forget(self, sequence: int) -> None:
        """It is closed; one that nothing was sampled for is ignored."""
        self._read_news()
        self._tokens.pop(sequence, None)

    def __getitem__(self, sequence: int) -> int:
        self._read_news()
        return self._tokens[sequence]

    def __iter__(self) -> Iterator[int]:
        self._read_news()
        return iter(self._tokens)

    def __len__(self) -> int:
        self._read_news()
        return len(self._tokens)

    def _read_news(self) -> None:
        if self._news is not None:
            sequences, tokens = self._news
            self._tokens.update(zip(sequences.tolist(), tokens.tolist(), strict=True))
            self._news = None
