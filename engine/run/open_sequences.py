"""What a rank knows about the open sequences of its shard.

Place 9 of a request. On a rank that does not sample this is only their block tables.
"""

from collections.abc import Sequence

import numpy as np
import torch

from engine.plan import StepPlan, Work
from engine.request_trace import is_tracing, trace_place
from engine.run.block_tables import BlockTables
from engine.run.grammar.guides import AllowedTokens, Guides
from engine.run.last_tokens import LastTokens
from engine.run.pooling import Pooler
from engine.run.sampling.columns import SamplingColumns
from engine.run.sampling.edit_table import EditTable
from engine.run.sampling.state import Row, SamplingState
from engine.run.transfer import upload
from engine.run.verification import sampling_rows


class OpenSequences:
    """The open sequences of one rank: opened and closed by plans, and extended by their works."""

    def __init__(self, *, shard: int, vocab_size: int | None, guides: Guides, pooler: Pooler, device: torch.device) -> None:
        """``vocab_size``: how many ids can be sampled; None on a rank that does not sample."""
        self.shard, self._vocab_size, self._device = shard, vocab_size, device
        self.tables = BlockTables()
        self.guides, self.pooler = guides, pooler
        self.states: dict[int, SamplingState] = {}
        """Empty on a rank that does not sample."""
        self.last_tokens = LastTokens()
        """Filled only where plans may be made ahead of the results."""
        self.columns: SamplingColumns | None = None
        """Set when the sampler is replayed."""
        self.edit_table: EditTable | None = None
        """Set when the tokens that sequences have seen are counted on the device."""

    def __repr__(self) -> str:
        return repr(self.tables)

    def enable_sampler_graphs(self, edit_table: EditTable | None) -> None:
        """Prepare for a replayed sampler. No sequence may be open."""
        assert not self.states
        self.columns, self.edit_table = SamplingColumns(), edit_table

    def open_and_close(self, plan: StepPlan) -> None:
        """Open and close the sequences of this shard as the plan says."""
        for sequence in plan.closed:
            self._close(sequence)
        for opening in plan.opened:
            if opening.shard != self.shard:
                continue
            row = self.tables.open(opening.sequence)
            self.pooler.open(opening)
            if self._vocab_size is None:
                continue
            state = self.states[opening.sequence] = SamplingState(opening, vocab_size=self._vocab_size)
            if self.edit_table is not None:
                self.edit_table.open(state)
            if self.columns is not None:
                self.columns.put(row, state)
            self.guides.open(opening)

    def _close(self, sequence: int) -> None:
        self.tables.close(sequence)
        state = self.states.pop(sequence, None)
        if state is not None and self.edit_table is not None:
            self.edit_table.close(state)
        self.last_tokens.forget(sequence)
        self.guides.close(sequence)
        self.pooler.close(sequence)

    def add_tokens(self, work: Work) -> None:
        """Record the tokens of a work, for the parameters that need them on the host."""
        self.states[work.sequence].add_tokens(work)
        self.guides.add_tokens(work)

    def count_on_device(self, works: Sequence[Work]) -> None:
        """Count the newest token of each work on the device, if the sequence has an entry there and the token is not counted yet.

        For steps whose sampling is not replayed.
        """
        if self.edit_table is None:
            return
        newest = ((self.states[work.sequence].entry, work.tokens[-1], work.start + len(work.tokens) - 1) for work in works)
        counted = [one for one in newest if one[0] >= 0]
        if counted:
            entries_R, tokens_R, starts_R = upload(np.array(counted, np.int64).T.copy(), self._device)
            self.edit_table.count_tokens(entries_R, tokens_R, starts_R)

    def rows(self, work: Work, allowed: AllowedTokens | None = None) -> list[Row]:
        """The rows to be sampled after a work."""
        return sampling_rows(work, self.states[work.sequence], allowed.words if allowed else None)

    def trace(self, place: int, works: Sequence[Work]) -> None:
        """Log the place of each request; only one rank per shard does."""
        if self._vocab_size is not None and is_tracing():
            for work in works:
                trace_place(place, self.states[work.sequence].request_id)
