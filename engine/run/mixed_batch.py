"""A step with prefill and decode in one batch.

Place 9 of a request. Its sampling rows are columns, so that the sampler can be replayed although the model is launched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from engine.plan import NO_BLOCK, StepPlan, Work
from engine.run.batch_builder import BuiltBatch, forward_batch
from engine.run.block_tables import BlockTables
from engine.run.decode_graphs import DecodeGraphs
from engine.run.decode_rows import DecodeRows
from engine.run.forward import Forward
from engine.run.last_tokens import broadcast_tokens, fill_unknown_tokens
from model.batch import ForwardBatch


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """A shard's part of a mixed step."""

    sampling: DecodeRows
    """Each sequence that samples after its last token, in the order of the logits."""
    num_decodes: int
    """How many of ``sampling``, the first ones, are planned as columns."""
    other_works: tuple[Work, ...]
    """All other works, those with one token first. Some of them do not sample."""

    @property
    def non_sampling(self) -> list[int]:
        """Sequences that do not sample in this step."""
        return [work.sequence for work in self.other_works if not work.samples]

    def append_blocks(self, tables: BlockTables) -> None:
        """Append the plan's new blocks to the block tables."""
        decodes = self.sampling.columns[:, : self.num_decodes]
        tables.append_to(tables.rows(decodes[0].tolist()), decodes[3])
        for work in self.other_works:
            tables.append(work)

    def launch(
        self,
        tables: BlockTables,
        graphs: DecodeGraphs,
        forward: Forward,
        tokens_S: np.ndarray,
        *,
        num_to_broadcast: int,
        counts: bool,
    ) -> Tensor:
        """Launch the step without waiting for it. Returns logits (S, V) in the buffer of the captured steps.

        ``tokens_S`` as in `DecodeGraphs.run`; the other ranks of the tp group do not know the first ``num_to_broadcast``. ``counts``:
        leave the tokens where the replayed sampler counts them.
        """
        model = forward.model
        batch = self._build(tables, tokens_S, forward.cache.layout.block_tokens, model.device)
        if (tokens_S[: self.num_decodes] < 0).any():
            fill_unknown_tokens(batch.tokens_T[: self.num_decodes], graphs.report)
        if num_to_broadcast:
            broadcast_tokens(batch.tokens_T[:num_to_broadcast], model.groups.tp)
        built = BuiltBatch(batch, (), ())
        hidden_TD, kept_R = forward.hidden(batch, built.kept_rows)
        assert hidden_TD is not None  # there is only one stage
        assert graphs.logits is not None
        count = len(self.sampling)
        logits_SV = graphs.logits[:count]
        logits_SV.copy_(model.logits(built.sampled_rows(hidden_TD, kept_R))[:, : logits_SV.shape[1]])
        if counts:
            graphs.tokens_P[:count].copy_(batch.tokens_T[batch.logit_rows_R])
            graphs.positions_P[:count].copy_(batch.positions_T[batch.logit_rows_R])
        return logits_SV

    def _build(self, tables: BlockTables, tokens_S: np.ndarray, block_tokens: int, device: torch.device) -> ForwardBatch:
        decodes, other_works = self.sampling.columns[:, : self.num_decodes], self.other_works

        def column(of_decodes: np.ndarray | int, of_works: Sequence[int]) -> np.ndarray:
            return np.concatenate([np.full(self.num_decodes, of_decodes), np.array(of_works, np.int64)])

        tokens = np.fromiter(chain.from_iterable(work.tokens for work in other_works), np.int64)
        return forward_batch(
            decodes[0].tolist() + [work.sequence for work in other_works],
            tables,
            tokens=np.concatenate([tokens_S[: self.num_decodes], tokens]),
            starts=column(decodes[1], [work.start for work in other_works]),
            counts=column(1, [len(work.tokens) for work in other_works]),
            num_rows=column(1, [int(work.samples) for work in other_works]),
            block_tokens=block_tokens,
            device=device,
        )


def mixed_batch(plan: StepPlan, shard: int) -> MixedBatch | None:
    """A shard's part of the plan as a mixed batch; None if nothing samples, or if a work needs more than tokens."""
    other_works = tuple(sorted((work for work in plan.other_works if work.shard == shard), key=lambda work: len(work.tokens) > 1))
    if any(work.num_draft or work.targets or work.pools or work.num_next_draft for work in other_works):
        return None
    columns = plan.decodes.columns
    positions = np.flatnonzero(columns[4] == shard)
    sampling = tuple(work for work in other_works if work.samples)
    last = [(work.sequence, work.start + len(work.tokens) - 1, work.tokens[-1], NO_BLOCK) for work in sampling]
    rows = np.concatenate([columns[:4, positions], np.array(last, np.int64).reshape(-1, 4).T], axis=1)
    return MixedBatch(DecodeRows(rows, positions, columns.shape[1], sampling), len(positions), other_works) if rows.shape[1] else None
