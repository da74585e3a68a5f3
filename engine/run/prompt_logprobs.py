"""Log-probabilities of the tokens of a prompt. Place 11 of a request that asks for them.

The logits of a long prompt would fill gigabytes, so they are computed for some rows at a time and only the results are kept. Every rank of
the last stage takes part, because each has a share of the vocabulary; one of them keeps the results.
T tokens in the batch, D model width, R rows computed at once, V vocabulary.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.plan import PromptLogprobs, TokenLogprobs
from engine.run.batch_builder import BuiltBatch
from engine.run.sampling.logprobs import token_logprobs
from engine.run.sampling.state import SamplingState
from engine.run.transfer import upload
from model.qwen2 import Qwen2

ROWS_AT_ONCE = 64
"""Rows of logits at a time: 40 MB in float32 with Qwen2's vocabulary."""


class PromptScorer:
    """Computes the same rows on all ranks of the last stage. ``vocab_size`` is None on those that do not answer."""

    def __init__(self, model: Qwen2, vocab_size: int | None) -> None:
        self._model, self._vocab_size = model, vocab_size

    def score(self, hidden_TD: Tensor, built: BuiltBatch, states: dict[int, SamplingState]) -> tuple[PromptLogprobs, ...]:
        """A result for each work with targets, if this rank answers. ``hidden_TD`` is what `Qwen2.hidden` returned."""
        works = [work for work in built.works if work.targets]
        logprobs = self._logprobs(hidden_TD, list(_rows(built, states)))
        return tuple(PromptLogprobs(work.sequence, tuple(islice(logprobs, len(work.targets)))) for work in works) if self._answers else ()

    @property
    def _answers(self) -> bool:
        return self._vocab_size is not None

    def _logprobs(self, hidden_TD: Tensor, rows: "list[_Row]") -> Iterator[TokenLogprobs]:
        found: list[TokenLogprobs] = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            at_R, targets_R = upload(np.array([[row.at for row in some], [row.target for row in some]], np.int64), hidden_TD.device)
            logits_RV = self._model.logits(hidden_TD[at_R])
            if self._answers:
                found += token_logprobs(logits_RV[:, : self._vocab_size], targets_R, [row.num_top for row in some])
        return iter(found)


class _Row(NamedTuple):
    at: int
    """Index into T of the token whose logits are used."""
    target: int
    num_top: int


def _rows(built: BuiltBatch, states: dict[int, SamplingState]) -> Iterator[_Row]:
    for work, first in zip(built.works, built.forward.query_starts, strict=False):
        if not work.targets:
            continue
        state = states.get(work.sequence)  # None on ranks that do not answer
        num_top = (state.sampling.prompt_logprobs or 0) if state else 0
        yield from (_Row(first + at, target, num_top) for at, target in enumerate(work.targets))
