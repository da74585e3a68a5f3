"""A step that was launched and may still be running on the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from engine.plan import StepPlan, StepResult
from engine.run.decode_rows import DecodeRows
from engine.run.sampling.sampler_graphs import Report


@dataclass(eq=False)
class AsyncStep:
    """A `StepHandle` returned by `engine.run.runner.Runner.begin` for a step that needs nothing from the host."""

    outcome: StepResult | None
    """None until `finish` has read it."""
    plan: StepPlan
    rows: DecodeRows
    """A token is `NO_TOKEN` if it was not known when the step was launched."""
    table_rows_S: np.ndarray
    columns: np.ndarray
    """From `SamplingColumns.of`."""
    size: int
    """Rows of the captured step, padding included."""
    finish: Callable[["AsyncStep"], None]
    """Reads the report and sets `outcome`."""
    logits_SV: Tensor | None = None
    """The buffer to which the captured step writes its logits."""
    report: Report | None = None
    began: float = field(default_factory=time.perf_counter)

    def is_done(self) -> bool:
        return self.outcome is not None or (self.report is not None and self.report.is_ready())

    def result(self) -> StepResult | None:
        self.finish(self)
        return self.outcome

    def row_positions(self, other: "AsyncStep") -> np.ndarray:
        """int64: for each row of ``other`` the row of this step that has the same sequence, or -1."""
        here, there = self.rows.columns[0], other.rows.columns[0]
        if np.array_equal(here, there):
            return np.arange(len(here))
        position_of_row = np.full(max(self.table_rows_S.max(), other.table_rows_S.max()) + 1, -1)
        position_of_row[self.table_rows_S] = np.arange(len(here))
        positions: np.ndarray = position_of_row[other.table_rows_S]
        positions[here[positions] != there] = -1  # this row of the block tables belongs to another sequence now
        return positions
