"""Step 9 of a request, where prompts come beside those that decode: sampling is replayed, and begun before the step before is read.

`RunnerConfig.prompts_ahead`. Off until it has run on a device; without this file, and the line in `engine.run.runner.Runner.capture` that
takes it up, such steps are computed as all others.
"""

from functools import partial

from engine.plan import StepPlan
from engine.run.forward import Forward
from engine.run.launched_rows import LaunchedRows, launched_rows
from engine.run.replayed import Replayed
from engine.run.replayed_steps import ReplayedSteps
from engine.run.sampling.columns import may_be_edited
from engine.run.tokens_said import num_with_unknown_tokens


class PromptsAhead:
    """Of a rank that samples and whose steps are begun ahead."""

    def __init__(self, replayed: ReplayedSteps, forward: Forward) -> None:
        """``replayed``: the steps between which these come."""
        assert replayed.sampler_graphs is not None
        self._decode_graphs, self._sampler_graphs = replayed.decode_graphs, replayed.sampler_graphs
        self._sequences, self._under_way, self._forward = replayed.sequences, replayed.under_way, forward

    def begin(self, plan: StepPlan, _began: float) -> Replayed | None:
        """None where the host has a say in what the step gives, and nothing has been done."""
        launched = launched_rows(plan, self._sequences.shard)
        if launched is None or not self._takes(launched):
            return None
        rows, tables = launched.sampling, self._sequences.tables
        assert self._sequences.columns is not None
        table_rows_S = tables.rows_of(rows.columns[0])
        columns = self._sequences.columns.of(table_rows_S)
        if not self._under_way.takes(columns, rows):
            return None
        launched.enter(tables)
        num_said = num_with_unknown_tokens(plan, self._sequences.shard)
        counts = self._sampler_graphs.edits and may_be_edited(columns)
        launch = partial(launched.launch, tables, self._decode_graphs, self._forward, num_said=num_said, counts=counts)
        size = self._decode_graphs.size_for(len(rows))
        step = Replayed(None, plan, rows, table_rows_S, columns, size, self._under_way.settle)
        return self._under_way.begin(step, launch, self._sampler_graphs)

    def _takes(self, launched: LaunchedRows) -> bool:
        sequences = self._sequences
        return (
            self._decode_graphs.takes(len(launched.sampling))
            and not sequences.pools.want(launched.singly)
            and not any(sequences.states[sequence].sampling.grammar for sequence in launched.silent)
        )
