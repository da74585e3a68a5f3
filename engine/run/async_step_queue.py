"""Launches steps behind each other without reading their results in between. Place 9 of a request.

A step's input tokens are taken from the output of the step before, on the device. The host reads a step's output while the next step is
running. S sequences, V vocabulary.
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
"""Launches the computation of logits (S, V). Takes the input tokens (S) of its rows; -1 - n means the token at index n of the previous
step's output."""

SAME_ROWS = -1 - np.arange(MAX_ROWS)
"""Input tokens when every row stands where it stood in the previous step."""


class AsyncStepQueue:
    """The steps of one rank that were launched and not yet read, in order. At most two."""

    def __init__(self, sequences: OpenSequences, result_builder: ResultBuilder) -> None:
        self._sequences, self._result_builder = sequences, result_builder
        self._steps: list[AsyncStep] = []
        self._host_free_columns: np.ndarray | None = None
        """Columns that never need the host. Mostly the next step has the same array."""

    def __len__(self) -> int:
        return len(self._steps)

    def accepts(self, columns: np.ndarray, rows: DecodeRows) -> bool:
        """Whether a step of these rows needs nothing from the host."""
        if columns is self._host_free_columns:
            return True
        if may_need_host(columns):
            return not needs_host(columns, rows.starts + 1)
        self._host_free_columns = columns
        return True

    def begin(self, step: AsyncStep, launch: Launch, sampler_graphs: SamplerGraphs) -> AsyncStep:
        """Launch a step that `accepts` has accepted."""
        rows = step.rows
        traced = rows.works() if is_tracing() else []
        self._sequences.trace(9, traced)
        tokens_S = self._tokens_of(step)
        self._sequences.trace(10, traced)
        logits_SV = launch(tokens_S)
        assert logits_SV is not None
        if hit("rank.logits"):
            logits_SV.fill_(torch.nan)
        self._sequences.trace(11, traced)
        step.logits_SV, step.report = logits_SV, sampler_graphs.launch(step.columns, rows.starts + 1, step.size)
        self._steps.append(step)
        return step

    def make_room(self) -> None:
        """Read the oldest step if there are two."""
        if len(self._steps) > 1:
            self.finish(self._steps[0])

    def finish_all(self) -> None:
        """Read all steps."""
        while self._steps:
            self.finish(self._steps[0])

    def _tokens_of(self, step: AsyncStep) -> np.ndarray:
        """The input tokens.

        Those that are not known are in the previous step's output; if one is not there, wait for that step and read it.
        """
        rows, unknown = step.rows, step.rows.unknown
        if not len(unknown):
            return rows.tokens
        if self._steps and self._steps[-1].table_rows_S is step.table_rows_S and len(unknown) == len(rows):
            return SAME_ROWS[: len(rows)]
        positions = self._steps[-1].row_positions(step)[unknown] if self._steps else unknown[:0]
        if not len(positions) or positions.min() < 0:
            self.finish_all()
            rows.fill_unknown(self._sequences.last_tokens)
            return rows.tokens
        tokens_S = rows.tokens.copy()
        tokens_S[unknown] = -1 - positions
        return tokens_S

    def finish(self, step: AsyncStep) -> None:
        """Read the output of a step, if that has not been done. The next step in the queue learns the tokens from it."""
        if step.outcome is not None:
            return
        assert step is self._steps[0]
        assert step.report is not None
        report = step.report.read()
        if report[1:].all():  # no row has a fault
            tokens, sampled = step.rows.results(report[0])
            output = RankOutput(sampled, tokens=tokens)
        else:
            # These may already be the next step's logits. That does not matter, as no row of such a step wants log-probabilities.
            assert step.logits_SV is not None
            step.rows.fill_unknown(self._sequences.last_tokens)
            with torch.inference_mode():
                output = RankOutput(self._result_builder.from_report(step.rows, step.logits_SV, report))
        step.outcome = self._result_builder.build(step.plan, output, step.began)
        self._steps.pop(0)
