"""Input tokens of steps that were planned before the previous step was answered. Place 9 of a request.

The sampling rank fills in what it sampled itself, and broadcasts it to the ranks that compute with it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.plan import COLUMN, NO_TOKEN, Decodes, SampledTokens, StepPlan
from parallel.collectives import broadcast
from parallel.groups import Group

SAMPLING_TP_RANK = 0
"""The sampling rank's position in its tp group (`engine.run.runner.sampling_ranks`)."""


def broadcast_tokens(tokens_T: Tensor, tp: Group) -> None:
    """Overwrite the tokens (contiguous, on the device) with those of the sampling rank.

    All ranks of the tp group decide from the plan whether a step does this.
    """
    assert tokens_T.is_contiguous()
    broadcast(tokens_T, SAMPLING_TP_RANK, tp)


def fill_unknown_tokens(tokens_T: Tensor, report: Tensor) -> None:
    """Replace each negative token -1 - n by the one at index n of the previous step's report. All on the device, int64."""
    tokens_T.copy_(torch.where(tokens_T < 0, report[(-1 - tokens_T).clamp(min=0)], tokens_T))


def num_decodes_to_broadcast(plan: StepPlan, shard: int) -> int:
    """The number of a shard's decodes if the plan lacks the token of any of them, else 0.

    They are the first works and the first tokens of the batch.
    """
    columns = plan.decodes.columns
    tokens = columns[2, columns[4] == shard]
    return len(tokens) if (tokens == NO_TOKEN).any() else 0


def with_known_tokens(plan: StepPlan, last_tokens: Mapping[int, int]) -> StepPlan:
    """The plan with every `NO_TOKEN` replaced.

    A sequence that got no token in the previous step gets an arbitrary one: nobody will read what follows.
    """
    columns = plan.decodes.columns if len(plan.decodes) else None
    if columns is None or not (columns[2] == NO_TOKEN).any():
        return plan
    known = columns.copy()
    for at in np.flatnonzero(columns[2] == NO_TOKEN).tolist():
        known[2, at] = last_tokens.get(int(columns[0, at]), 0)
    return replace(plan, decodes=Decodes.of(known))


class LastTokens(Mapping[int, int]):
    """The last sampled token of each open sequence.

    Columns are kept as they arrived until a token is asked for. In most steps nobody asks, because the next step takes its tokens from
    the device.
    """

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self._news: tuple[np.ndarray, np.ndarray] | None = None
        """Sequences and their tokens, newer than `_tokens`."""

    def record(self, decodes: Decodes, tokens: bytes, rest: Iterable[SampledTokens]) -> None:
        """Record a step's output: ``tokens`` as in `StepResult.tokens`, and the rest."""
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
        """Forget a closed sequence. Ignored if it never got a token."""
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
