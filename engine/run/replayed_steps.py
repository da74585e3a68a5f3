"""Step 9 of a request, where its step computes one token of each sequence: it is replayed, and where the host has no say, begun ahead."""

from functools import partial

import numpy as np
import torch

from engine.begun import Begun
from engine.failpoints import hit
from engine.places import is_asked_for
from engine.plan import StepPlan
from engine.run.answering import Answering, Given
from engine.run.decode_graphs import DecodeGraphs
from engine.run.decode_rows import DecodeRows, decode_rows
from engine.run.open_sequences import OpenSequences
from engine.run.replayed import Replayed
from engine.run.sampling.columns import LEARNS, NEEDS, are_edited_by_host
from engine.run.sampling.sampler_graphs import SamplerGraphs
from engine.run.under_way import UnderWay
from parallel.last_collective import note_replay


class ReplayedSteps:
    """One rank's. ``sampler_graphs`` is None where it does not sample."""

    def __init__(
        self,
        decode_graphs: DecodeGraphs,
        sampler_graphs: SamplerGraphs | None,
        *,
        sequences: OpenSequences,
        answering: Answering,
        under_way: UnderWay,
        runs_ahead: bool,
    ) -> None:
        """``runs_ahead``: a step may be begun before the one before it is read (`Capacity.runs_ahead`)."""
        self.decode_graphs, self.sampler_graphs = decode_graphs, sampler_graphs
        self.sequences, self.under_way, self.runs_ahead = sequences, under_way, runs_ahead
        self._answering = answering

    def begin(self, plan: StepPlan, began: float) -> Begun | None:
        """None where the plan has another step, and nothing has been done. ``began``: when the rank took it, by `time.perf_counter`."""
        rows = decode_rows(plan, self.sequences.shard)
        if rows is None or not self.decode_graphs.takes(len(rows)):
            return None
        note_replay(plan.step)
        table_rows_S = rows.enter(self.sequences.tables)
        columns = self.sequences.columns.of(table_rows_S) if self.sequences.columns is not None else None
        if columns is not None and self.sampler_graphs is not None and self.runs_ahead and self.under_way.takes(columns, rows):
            launch = partial(self.decode_graphs.run, rows, table_rows_S, self.sequences.tables)
            size = self.decode_graphs.size_for(len(rows))
            step = Replayed(None, plan, rows, table_rows_S, columns, size, self.under_way.settle)
            return self.under_way.begin(step, launch, self.sampler_graphs)
        self.under_way.settle_all()
        rows.learn(self.sequences.said)
        return Begun(self._answering.result(plan, self._run(rows, table_rows_S, columns), began))

    def _run(self, rows: DecodeRows, table_rows_S: np.ndarray, columns: np.ndarray | None) -> Given:
        """A step that is over when this returns. ``columns`` are None on a rank that does not sample."""
        sequences, known_S = self.sequences, rows.starts + 1
        marked = rows.works() if is_asked_for() else []
        sequences.mark(9, marked)
        sequences.mark(10, marked)
        logits_SV = self.decode_graphs.run(rows, table_rows_S, sequences.tables)  # the device has enough to do now
        if self.sampler_graphs is None or columns is None or logits_SV is None:
            return Given()
        if hit("rank.logits"):
            logits_SV.fill_(torch.nan)
        sequences.mark(11, marked)
        for at in np.flatnonzero(columns[NEEDS] & LEARNS).tolist():
            sequences.take(rows.work(at))
        looked_up = sequences.guides.begin(rows.sequences)
        allowed = looked_up.result() if looked_up else {}
        if are_edited_by_host(columns, known_S) or (allowed and not self.sampler_graphs.edits):
            works = rows.works()
            sequences.count(works)
            return Given(self._answering.sample(logits_SV, works, allowed))
        words = {at: one.words for at, number in enumerate(rows.sequences) if (one := allowed.get(number)) and one.words is not None}
        report = self.sampler_graphs.launch(columns, known_S, self.decode_graphs.size_for(len(rows)), words).read()
        return Given(self._answering.drawn(rows, logits_SV, report, allowed))
