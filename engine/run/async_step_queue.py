"""Step 9 of a request, where the host has no say in what its step gives: the device is told to do it behind what it is at.

What a step sampled is taken from where it lies on the device, and read when the next step is under way. S sequences, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.failpoints import hit
from engine.request_trace import is_tracing
from engine.run.async_step import AsyncStep
from engine.run.decode_graphs import MAX_ROWS
from engine.run.decode_rows import DecodeRows
from engine.run.open_sequences import OpenSequences
from engine.run.result_builder import RankOutput, ResultBuilder
from engine.run.sampling.columns import may_need_host, needs_host
from engine.run.sampling.sampler_graphs import SamplerGraphs

Launch = Callable[[np.ndarray], Tensor | None]
"""Begins to compute the logits (S, V) of a step. It is told the tokens (S) of its rows, -1 - n for one that stands at place n of what the
step before gives."""

SAME_ROWS = -1 - np.arange(MAX_ROWS)
"""Tokens of rows each of which stands where it stood in the step before."""


class AsyncStepQueue:
    """Steps of one rank that were begun and not read, in order; at most two."""

    def __init__(self, sequences: OpenSequences, result_builder: ResultBuilder) -> None:
        self._sequences, self._result_builder = sequences, result_builder
        self._steps: list[AsyncStep] = []
        self._host_free_columns: np.ndarray | None = None
        """Columns in which the host will never have a say: mostly they come again."""

    def __len__(self) -> int:
        return len(self._steps)

    def accepts(self, columns: np.ndarray, rows: DecodeRows) -> bool:
        """Whether the host has no say in what a step of these rows gives."""
        if columns is self._host_free_columns:
            return True
        if may_need_host(columns):
            return not needs_host(columns, rows.starts + 1)
        self._host_free_columns = columns
        return True

    def begin(self, step: AsyncStep, launch: Launch, sampler_graphs: SamplerGraphs) -> AsyncStep:
        """Have the device do a step that it takes."""
        rows = step.rows
        marked = rows.works() if is_tracing() else []
        self._sequences.mark(9, marked)
        tokens_S = self._tokens_of(step)
        self._sequences.mark(10, marked)
        logits_SV = launch(tokens_S)
        assert logits_SV is not None
        if hit("rank.logits"):
            logits_SV.fill_(torch.nan)
        self._sequences.mark(11, marked)
        step.logits_SV, step.report = logits_SV, sampler_graphs.launch(step.columns, rows.starts + 1, step.size)
        self._steps.append(step)
        return step

    def make_room(self) -> None:
        """For one more."""
        if len(self._steps) > 1:
            self.finish(self._steps[0])

    def finish_all(self) -> None:
        """Read whatever was begun."""
        while self._steps:
            self.finish(self._steps[0])

    def _tokens_of(self, step: AsyncStep) -> np.ndarray:
        """Those that are not known stand in what the step before gives; if not all of them do, the host waits and reads them."""
        rows, unknown = step.rows, step.rows.unknown
        if not len(unknown):
            return rows.tokens
        if self._steps and self._steps[-1].table_rows_S is step.table_rows_S and len(unknown) == len(rows):
            return SAME_ROWS[: len(rows)]
        places = self._steps[-1].row_positions(step)[unknown] if self._steps else unknown[:0]
        if not len(places) or places.min() < 0:
            self.finish_all()
            rows.fill_unknown(self._sequences.last_tokens)
            return rows.tokens
        tokens_S = rows.tokens.copy()
        tokens_S[unknown] = -1 - places
        return tokens_S

    def finish(self, step: AsyncStep) -> None:
        """Read what a step gave, if nobody has, and tell the one behind it."""
        if step.outcome is not None:
            return
        assert step is self._steps[0]
        assert step.report is not None
        report = step.report.read()
        if report[1:].all():  # sound
            tokens, sampled = step.rows.results(report[0])
            output = RankOutput(sampled, tokens=tokens)
        else:
            assert step.logits_SV is not None  # by now perhaps those of the step behind; nobody's log-probabilities are wanted
            step.rows.fill_unknown(self._sequences.last_tokens)
            with torch.inference_mode():
                output = RankOutput(self._result_builder.from_report(step.rows, step.logits_SV, report))
        step.outcome = self._result_builder.build(step.plan, output, step.began)
        self._steps.pop(0)
