"""Step 9 of a request: the works of a step become the tensors of one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from engine.plan import Work
from engine.run.block_tables import BlockTables
from engine.run.transfer import upload
from model.batch import ForwardBatch


@dataclass(frozen=True)
class BuiltBatch:
    """A forward batch, and whose its logits are."""

    forward: ForwardBatch
    works: tuple[Work, ...]
    """In the order of the forward batch's sequences."""
    sampling_works: tuple[Work, ...]
    """In the order of the logit rows, of which each has one, and one more for each guessed token."""

    @property
    def kept_rows(self) -> Tensor | None:
        """For `Qwen2.hidden` where nobody asks for more than logits. The first token, if none samples: kernels and sums over ranks are not
        asked for nothing."""
        rows_R = self.forward.logit_rows_R
        if len(rows_R) == self.forward.num_tokens:
            return None
        return rows_R if len(rows_R) else rows_R.new_zeros(1)

    def that_sample(self, hidden_XD: Tensor, kept_R: Tensor | None) -> Tensor:
        """Hidden states (R, D) for the head, of what `Qwen2.hidden` gave with ``kept_R``."""
        rows_R = self.forward.logit_rows_R
        return hidden_XD[rows_R] if kept_R is None else hidden_XD[: len(rows_R)]


def build_batch(works: Sequence[Work], tables: BlockTables, block_tokens: int, device: torch.device) -> BuiltBatch:
    """The works with one token each first, otherwise in the order of the plan. ``tables`` has their new blocks already."""
    works = sorted(works, key=lambda work: len(work.tokens) > 1)
    counts = np.fromiter((len(work.tokens) for work in works), np.int64, len(works))
    starts = np.fromiter((work.start for work in works), np.int64, len(works))
    query_starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    num_tokens = int(query_starts[-1])

    tokens = np.fromiter(chain.from_iterable(work.tokens for work in works), np.int64, num_tokens)
    sequence_of = np.repeat(np.arange(len(works)), counts)
    positions = np.arange(num_tokens) - query_starts[sequence_of] + starts[sequence_of]
    table, num_blocks = tables.of(tables.rows([work.sequence for work in works]))
    _check_blocks(works, starts + counts, num_blocks * block_tokens)
    slots = table[sequence_of, positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens

    num_rows = np.fromiter((work.num_draft + 1 if work.samples else 0 for work in works), np.int64, len(works))
    logit_rows = np.arange(num_rows.sum()) + np.repeat(query_starts[1:] - num_rows.cumsum(), num_rows)
    # One copy for all that has the same dtype: a step's cost on a device is counted in copies, not in bytes.
    numbers = upload(np.concatenate([tokens, positions, slots, logit_rows]), device)
    tokens_T, positions_T, slots_T, logit_rows_R = numbers.split([num_tokens, num_tokens, num_tokens, len(logit_rows)])
    small = upload(np.concatenate([table.ravel(), (starts + counts).astype(np.int32)]), device)
    blocks, lengths_S = small.split([table.size, len(works)])
    forward = ForwardBatch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        slots_T=slots_T,
        block_tables_SM=blocks.view(table.shape),
        lengths_S=lengths_S,
        query_starts=tuple(query_starts.tolist()),
        context_lengths=tuple((starts + counts).tolist()),
        num_decodes=int((counts == 1).sum()),
        logit_rows_R=logit_rows_R,
    )
    return BuiltBatch(forward, tuple(works), tuple(work for work in works if work.samples))


def _check_blocks(works: Sequence[Work], wanted_tokens: np.ndarray, held_tokens: np.ndarray) -> None:
    """A plan that writes beyond its sequence's blocks would write into another sequence's."""
    short = np.flatnonzero(wanted_tokens > held_tokens)
    if len(short):
        first = int(short[0])
        raise ValueError(
            f"sequence {works[first].sequence} computes up to token {int(wanted_tokens[first])} "
            f"and its blocks hold {int(held_tokens[first])}"
        )
