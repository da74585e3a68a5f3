"""Executes decode-only steps by replaying CUDA graphs. Place 9 of a request. A step that needs nothing from the host is launched ahead."""

from functools import partial

import numpy as np
import torch

from engine.failpoints import hit
from engine.plan import StepPlan
from engine.request_trace import is_tracing
from engine.run.async_step import AsyncStep
from engine.run.async_step_queue import AsyncStepQueue
from engine.run.decode_graphs import DecodeGraphs
from engine.run.decode_rows import DecodeRows, decode_rows
from engine.run.open_sequences import OpenSequences
from engine.run.result_builder import RankOutput, ResultBuilder
from engine.run.sampling.columns import NEEDS, TRACKS_TOKENS, are_edited_by_host
from engine.run.sampling.sampler_graphs import SamplerGraphs
from engine.step_handle import CompletedStep, StepHandle
from parallel.last_collective import record_replay


class GraphSteps:
    """One rank's decode-only steps. ``sampler_graphs`` is None on a rank that does not sample."""

    def __init__(
        self,
        decode_graphs: DecodeGraphs,
        sampler_graphs: SamplerGraphs | None,
        *,
        sequences: OpenSequences,
        result_builder: ResultBuilder,
        async_steps: AsyncStepQueue,
        runs_ahead: bool,
    ) -> None:
        """``runs_ahead``: a step may be launched before the result of the step before it is read (`Capacity.runs_ahead`)."""
        self.decode_graphs, self.sampler_graphs = decode_graphs, sampler_graphs
        self.sequences, self.async_steps, self.runs_ahead = sequences, async_steps, runs_ahead
        self._result_builder = result_builder

    def begin(self, plan: StepPlan, began: float) -> StepHandle | None:
        """Launch the step, or return None without side effects if it is not a decode-only step that fits the graphs.

        ``began`` is when the rank received the plan (`time.perf_counter`).
        """
        rows = decode_rows(plan, self.sequences.shard)
        if rows is None or not self.decode_graphs.accepts(len(rows)):
            return None
        record_replay(plan.step)
        table_rows_S = rows.append_blocks(self.sequences.tables)
        columns = self.sequences.columns.of(table_rows_S) if self.sequences.columns is not None else None
        if columns is not None and self.sampler_graphs is not None and self.runs_ahead and self.async_steps.accepts(columns, rows):
            launch = partial(self.decode_graphs.run, rows, table_rows_S, self.sequences.tables)
            size = self.decode_graphs.size_for(len(rows))
            step = AsyncStep(None, plan, rows, table_rows_S, columns, size, self.async_steps.finish)
            return self.async_steps.begin(step, launch, self.sampler_graphs)
        self.async_steps.finish_all()
        rows.fill_unknown(self.sequences.last_tokens)
        return CompletedStep(self._result_builder.build(plan, self._run(rows, table_rows_S, columns), began))

    def _run(self, rows: DecodeRows, table_rows_S: np.ndarray, columns: np.ndarray | None) -> RankOutput:
        """Execute a step to its end. ``columns`` is None on a rank that does not sample."""
        sequences, known_S = self.sequences, rows.starts + 1
        traced = rows.works() if is_tracing() else []
        sequences.trace(9, traced)
        sequences.trace(10, traced)
        # the device is busy from here on, and the host can work meanwhile
        logits_SV = self.decode_graphs.run(rows, table_rows_S, sequences.tables)
        if self.sampler_graphs is None or columns is None or logits_SV is None:
            return RankOutput()
        if hit("rank.logits"):
            logits_SV.fill_(torch.nan)
        sequences.trace(11, traced)
        for at in np.flatnonzero(columns[NEEDS] & TRACKS_TOKENS).tolist():
            sequences.add_tokens(rows.work(at))
        masks = sequences.guides.begin(rows.sequences)
        allowed = masks.result() if masks else {}
        if are_edited_by_host(columns, known_S) or (allowed and not self.sampler_graphs.edits):
            works = rows.works()
            sequences.count_on_device(works)
            return RankOutput(self._result_builder.sample(logits_SV, works, allowed))
        words = {at: one.words for at, number in enumerate(rows.sequences) if (one := allowed.get(number)) and one.words is not None}
        report = self.sampler_graphs.launch(columns, known_S, self.decode_graphs.size_for(len(rows)), words).read()
        return RankOutput(self._result_builder.from_report(rows, logits_SV, report, allowed))
