"""CUDA graphs of the model for steps that compute one token of each sequence, each for a fixed number of rows. Place 10 of a request.

S sequences of a step, P rows of the largest captured step (padding included), M most blocks of a sequence, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.run.block_tables import BlockTables
from engine.run.cuda_graphs import GraphRecorder, Replay
from engine.run.decode_inputs import BLOCKS, POSITIONS, TOKENS, unpack_decode_inputs
from engine.run.decode_rows import DecodeRows
from engine.run.last_tokens import broadcast_tokens
from engine.run.transfer import Staging, refill
from model.batch import ForwardBatch
from model.kv_cache import KvCache
from model.qwen2 import Qwen2
from parallel.aligned_rows import empty_rows

logger = logging.getLogger(__name__)

MAX_ROWS = 512
"""In larger steps the device takes much longer than the host needs to launch them."""


class DecodeGraphs:
    """One rank's `CapturedGraphs`.

    A step is padded to the next captured size with copies of its shortest sequence that write nowhere. They read memory that is read
    anyway, and choose the same experts. (They do count where the load of experts is measured.)
    """

    def __init__(
        self,
        model: Qwen2,
        cache: KvCache,
        graphs: GraphRecorder,
        *,
        max_rows: int,
        max_blocks: int,
        vocab_size: int | None,
        broadcasts_tokens: bool = False,
    ) -> None:
        """``max_blocks`` is M. ``vocab_size``: how many ids can be sampled; None on a rank that does not sample, which keeps no logits.

        ``broadcasts_tokens``: all ranks use the sampling rank's tokens, whatever the plan says.
        """
        self._model, self._cache, self._graphs, self._broadcasts_tokens = model, cache, graphs, broadcasts_tokens
        self.sizes = tuple(capture_sizes(max_rows))
        device = model.device
        self._inputs = Staging(3, max_rows, device=device)
        self.tokens_P, self._slots_P = (torch.zeros(max_rows, dtype=torch.int64, device=device) for _ in range(2))
        """int64: the input tokens of the last step, padding included, and the slots of their keys and values."""
        self.positions_P = self._inputs.on_device[POSITIONS]
        """int64: the positions of these tokens in their sequences."""
        self._lengths_P = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._tables = torch.zeros(max_rows, max_blocks, dtype=torch.int32, device=device)
        self._cached_for: tuple[int, np.ndarray, np.ndarray] | None = None
        """What `_tables` holds: the number of rows, the array of table rows (compared by identity), and the positions of the last step's
        tokens."""
        self.report = torch.zeros(3 * max_rows, dtype=torch.int64, device=device)
        """The sampler's output of the last step, tokens first (`engine.run.sampling.sampler_graphs`)."""
        self._batches = {size: self._batch(size) for size in self.sizes}
        self.logits: Tensor | None = None
        """(P, V): the last step's, overwritten by the next."""
        if vocab_size is not None:
            self.logits = empty_rows(max_rows, vocab_size, dtype=model.dtype, device=device).zero_()
        self.replays: dict[int, Replay] = {}
        """By number of rows: the model's launches, on the inputs that were uploaded last."""

    def __repr__(self) -> str:
        return f"<DecodeGraphs [{len(self.replays)} of {len(self.sizes)} captured | up to {self.sizes[-1]} rows]>"

    @property
    def num_graphs(self) -> int:
        return len(self.sizes)

    @torch.inference_mode()
    def capture(self, after_each: Callable[[], None] = lambda: None) -> None:
        self.replays.clear()
        self._inputs.on_device.zero_()
        self._inputs.on_device[BLOCKS] = -1  # no row writes to the cache
        self._cached_for = None
        for size in reversed(self.sizes):
            self.replays[size] = self._graphs.capture(partial(self._compute, size))
            after_each()

    def release(self) -> None:
        self.replays.clear()

    def accepts(self, num_rows: int) -> bool:
        """Whether a step with so many rows can be replayed. All ranks that compute this shard agree."""
        return num_rows <= self.sizes[-1]

    def size_for(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def run(self, rows: DecodeRows, table_rows_S: np.ndarray, tables: BlockTables, tokens_S: np.ndarray | None = None) -> Tensor | None:
        """Launch the step without waiting for it. Returns logits (S, V) on a rank that samples, valid until the next step.

        ``tokens_S`` replaces the tokens of ``rows``; a negative token -1 - n is the one at index n of the last step's report.
        """
        count, size, starts_S = len(rows), self.size_for(len(rows)), rows.starts
        blocks_S, capacity_S = tables.at(table_rows_S, starts_S, self._cache.layout.block_tokens)
        _check_blocks(rows, capacity_S)
        shortest = int(starts_S.argmin()) if size > count else 0
        inputs = self._inputs.next_host_array()
        for row, values_S in ((TOKENS, rows.tokens if tokens_S is None else tokens_S), (POSITIONS, starts_S), (BLOCKS, blocks_S)):
            inputs[row, :count] = values_S
            if size > count:
                inputs[row, count:size] = values_S[shortest] if row != BLOCKS else -1 - values_S[shortest]
        self._inputs.upload()
        if not self._tables_unchanged(size, table_rows_S, starts_S):
            blocks_SM, _ = tables.of(table_rows_S)
            if size > count:
                blocks_SM = np.concatenate([blocks_SM, blocks_SM[[shortest] * (size - count)]])
            refill(self._tables[:size, : blocks_SM.shape[1]], blocks_SM)
        self._cached_for = size, table_rows_S, starts_S
        self.replays[size]()
        return None if self.logits is None else self.logits[:count]

    def _tables_unchanged(self, size: int, table_rows_S: np.ndarray, starts_S: np.ndarray) -> bool:
        """Whether the block tables are those of the last step, except for the blocks of its new tokens.

        The array of rows is another one if any of its sequences was closed, or if another step was launched in between.
        """
        if self._cached_for is None:
            return False
        cached_size, cached_rows_S, cached_starts_S = self._cached_for
        return cached_size == size and cached_rows_S is table_rows_S and np.array_equal(cached_starts_S + 1, starts_S)

    def _batch(self, size: int) -> ForwardBatch:
        return ForwardBatch(
            tokens_T=self.tokens_P[:size],
            positions_T=self.positions_P[:size],
            slots_T=self._slots_P[:size],
            block_tables_SM=self._tables[:size],
            lengths_S=self._lengths_P[:size],
            query_starts=tuple(range(size + 1)),
            context_lengths=(),
            num_decodes=size,
            logit_rows_R=torch.arange(size, device=self.tokens_P.device),
        )

    def _compute(self, size: int) -> None:
        batch = self._batches[size]
        unpack_decode_inputs(
            self._inputs.on_device[:, :size], self.report, batch.tokens_T, batch.slots_T, batch.lengths_S, batch.block_tables_SM,
            self._cache.layout.block_tokens,
        )  # fmt: skip
        if self._broadcasts_tokens:
            broadcast_tokens(batch.tokens_T, self._model.groups.tp)
        hidden_TD = self._model.hidden(batch, self._cache)
        assert hidden_TD is not None  # there is only one stage
        logits_RV = self._model.logits(hidden_TD)
        if self.logits is not None:
            self.logits[:size].copy_(logits_RV[:, : self.logits.shape[1]])


def capture_obstacle(model: Qwen2, engine_config: EngineConfig) -> str | None:
    """Why steps of this model cannot be captured; None if they can. The same on all ranks of a replica."""
    if engine_config.speculate == "draft":
        return "a draft model runs on the ranks that sample"
    return model.capture_obstacle


def capture_sizes(max_rows: int) -> Iterator[int]:
    """The numbers of rows for which steps are captured: at most a fifth of a step's rows is padding.

    1 2 3 4 5 6 7 8 10 12 14 16 20 24 28 32 40 48 56 64 80 ... max_rows
    """
    size = 1
    while size < max_rows:
        yield size
        size += max(1, 1 << size.bit_length() >> 3)
    yield max_rows


def _check_blocks(rows: DecodeRows, capacity_S: np.ndarray) -> None:
    """See `engine.run.batch_builder`."""
    short = np.flatnonzero(rows.starts >= capacity_S)
    if len(short):
        at = int(short[0])
        raise ValueError(
            f"sequence {rows.sequences[at]} computes up to token {int(rows.starts[at]) + 1} and its blocks hold {int(capacity_S[at])}"
        )
