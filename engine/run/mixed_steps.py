"""Executes steps that mix prefill and decode: the model is launched, only the sampler is replayed, and the step runs ahead.

Place 9 of a request.

Enabled by `RunnerConfig.prompts_ahead`, which is off because it has not been measured on a device yet. Without this module, and the line
in `engine.run.runner.Runner.capture` that uses it, such steps are eager steps.
"""

from functools import partial

from engine.plan import StepPlan
from engine.run.async_step import AsyncStep
from engine.run.forward import Forward
from engine.run.graph_steps import GraphSteps
from engine.run.last_tokens import num_decodes_to_broadcast
from engine.run.mixed_batch import MixedBatch, mixed_batch
from engine.run.sampling.columns import may_be_edited


class MixedSteps:
    """For a sampling rank whose steps run ahead."""

    def __init__(self, graph_steps: GraphSteps, forward: Forward) -> None:
        """``graph_steps``: the decode-only steps, with which these share graphs and the queue."""
        assert graph_steps.sampler_graphs is not None
        self._decode_graphs, self._sampler_graphs = graph_steps.decode_graphs, graph_steps.sampler_graphs
        self._sequences, self._async_steps, self._forward = graph_steps.sequences, graph_steps.async_steps, forward

    def begin(self, plan: StepPlan, _began: float) -> AsyncStep | None:
        """Launch the step, or return None without side effects if the host is needed for its results. (It is timed from its launch.)"""
        batch = mixed_batch(plan, self._sequences.shard)
        if batch is None or not self._accepts(batch):
            return None
        rows, tables = batch.sampling, self._sequences.tables
        assert self._sequences.columns is not None
        table_rows_S = tables.rows_of(rows.columns[0])
        columns = self._sequences.columns.of(table_rows_S)
        if not self._async_steps.accepts(columns, rows):
            return None
        batch.append_blocks(tables)
        num_to_broadcast = num_decodes_to_broadcast(plan, self._sequences.shard)
        counts = self._sampler_graphs.edits and may_be_edited(columns)
        launch = partial(batch.launch, tables, self._decode_graphs, self._forward, num_to_broadcast=num_to_broadcast, counts=counts)
        size = self._decode_graphs.size_for(len(rows))
        step = AsyncStep(None, plan, rows, table_rows_S, columns, size, self._async_steps.finish)
        return self._async_steps.begin(step, launch, self._sampler_graphs)

    def _accepts(self, batch: MixedBatch) -> bool:
        sequences = self._sequences
        return (
            self._decode_graphs.accepts(len(batch.sampling))
            and not sequences.pooler.needs_all_tokens(batch.other_works)
            and not any(sequences.states[sequence].sampling.grammar for sequence in batch.non_sampling)
        )
