"""Builds the tensors of one forward pass from the works of a step. Place 9 of a request."""

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
    """A forward batch, and the works that its sequences and logits belong to."""

    forward: ForwardBatch
    works: tuple[Work, ...]
    """In the order of the forward batch's sequences."""
    sampling_works: tuple[Work, ...]
    """In the order of the rows of logits: one row for each work, and one more for each of its draft tokens."""

    @property
    def kept_rows(self) -> Tensor | None:
        """``kept_R`` for `Qwen2.hidden` if only logits are needed.

        If no token samples this is the first token: kernels and sums over ranks are never called with empty tensors.
        """
        rows_R = self.forward.logit_rows_R
        if len(rows_R) == self.forward.num_tokens:
            return None
        return rows_R if len(rows_R) else rows_R.new_zeros(1)

    def sampled_rows(self, hidden_XD: Tensor, kept_R: Tensor | None) -> Tensor:
        """The hidden states (R, D) for the head, from what `Qwen2.hidden` returned with ``kept_R``."""
        rows_R = self.forward.logit_rows_R
        has_every_row = kept_R is not None or len(rows_R) == self.forward.num_tokens
        return hidden_XD[: len(rows_R)] if has_every_row else hidden_XD[rows_R]


def build_batch(works: Sequence[Work], tables: BlockTables, block_tokens: int, device: torch.device) -> BuiltBatch:
    """Works with one token come first, otherwise the order is the plan's. ``tables`` must already hold their new blocks."""
    works = sorted(works, key=lambda work: len(work.tokens) > 1)
    counts = np.fromiter((len(work.tokens) for work in works), np.int64, len(works))
    forward = forward_batch(
        [work.sequence for work in works],
        tables,
        tokens=np.fromiter(chain.from_iterable(work.tokens for work in works), np.int64, int(counts.sum())),
        starts=np.fromiter((work.start for work in works), np.int64, len(works)),
        counts=counts,
        num_rows=np.fromiter((work.num_draft + 1 if work.samples else 0 for work in works), np.int64, len(works)),
        block_tokens=block_tokens,
        device=device,
    )
    return BuiltBatch(forward, tuple(works), tuple(work for work in works if work.samples))


def forward_batch(
    sequences: list[int],
    tables: BlockTables,
    *,
    tokens: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    num_rows: np.ndarray,
    block_tokens: int,
    device: torch.device,
) -> ForwardBatch:
    """The batch of these sequences; those with one token come first. All arrays are int64.

    ``tokens`` holds the sequences' tokens one after another. ``starts``, ``counts``, ``num_rows``: for each sequence the position of its
    first token, the number of its tokens, and for how many of them, the last ones, logits are needed.

    Raises:
        ValueError: tokens have no blocks.
    """
    num_tokens, num_sequences, ends = len(tokens), len(counts), starts + counts
    query_starts = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    sequence_of = np.repeat(np.arange(num_sequences), counts)
    positions = np.arange(num_tokens) - query_starts[sequence_of] + starts[sequence_of]
    table, num_blocks = tables.of(tables.rows(sequences))
    _check_blocks(sequences, ends, num_blocks * block_tokens)
    slots = table[sequence_of, positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens
    logit_rows = np.arange(num_rows.sum()) + np.repeat(query_starts[1:] - num_rows.cumsum(), num_rows)
    # One copy for all arrays of the same dtype: on a device the number of copies counts, not their bytes.
    numbers = upload(np.concatenate([tokens, positions, slots, logit_rows]), device)
    tokens_T, positions_T, slots_T, logit_rows_R = numbers.split([num_tokens, num_tokens, num_tokens, len(logit_rows)])
    small = upload(np.concatenate([table.ravel(), ends.astype(np.int32)]), device)
    blocks, lengths_S = small.split([table.size, num_sequences])
    return ForwardBatch(
        tokens_T=tokens_T,
        positions_T=positions_T,
        slots_T=slots_T,
        block_tables_SM=blocks.view(table.shape),
        lengths_S=lengths_S,
        query_starts=tuple(query_starts.tolist()),
        context_lengths=tuple(ends.tolist()),
        num_decodes=int((counts == 1).sum()),
        logit_rows_R=logit_rows_R,
    )


def _check_blocks(sequences: list[int], wanted_tokens: np.ndarray, held_tokens: np.ndarray) -> None:
    """Refuse a plan that writes beyond its sequence's blocks: it would overwrite another sequence's."""
    short = np.flatnonzero(wanted_tokens > held_tokens)
    if len(short):
        first = int(short[0])
        raise ValueError(
            f"sequence {sequences[first]} computes up to token {int(wanted_tokens[first])} and its blocks hold {int(held_tokens[first])}"
        )
