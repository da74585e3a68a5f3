"""A replayed step that the device may still be at."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from engine.plan import StepPlan, StepResult
from engine.run.decode_rows import DecodeRows
from engine.run.sampling.sampler_graphs import Report
from engine.step_handle import StepHandle


@dataclass(eq=False)
class AsyncStep(StepHandle):
    """What `engine.run.runner.Runner.begin` gives, where the host has no say in the step."""

    plan: StepPlan
    rows: DecodeRows
    """Their tokens are `NO_TOKEN` where they were not known when it was begun."""
    table_rows_S: np.ndarray
    columns: np.ndarray
    """As `SamplingColumns.of` gave them."""
    size: int
    """Rows of the captured step."""
    finish: Callable[["AsyncStep"], None]
    """Reads the report and sets `outcome`."""
    logits_SV: Tensor | None = None
    """Where the captured step left them."""
    report: Report | None = None
    began: float = field(default_factory=time.perf_counter)

    def is_done(self) -> bool:
        return self.outcome is not None or (self.report is not None and self.report.is_ready())

    def result(self) -> StepResult | None:
        self.finish(self)
        return self.outcome

    def row_positions(self, other: "AsyncStep") -> np.ndarray:
        """int64: where in this step the sequences of another one's rows are, -1 for those that are not."""
        here, there = self.rows.columns[0], other.rows.columns[0]
        if np.array_equal(here, there):
            return np.arange(len(here))
        place_of_row = np.full(max(self.table_rows_S.max(), other.table_rows_S.max()) + 1, -1)
        place_of_row[self.table_rows_S] = np.arange(len(here))
        places: np.ndarray = place_of_row[other.table_rows_S]
        places[here[places] != there] = -1  # the row was another's
        return places
