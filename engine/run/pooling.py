"""Turns hidden states into embeddings. Place 11 of a request for one. Everything about embeddings is named `pool`.

T tokens in the batch, R of one work, D model width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from engine.plan import NewSequence, PooledEmbedding, Work
from engine.request import Pooling
from engine.run.batch_builder import BuiltBatch
from model.qwen2 import Qwen2

NOT_FINITE = "the model gave NaN or infinity"


class Pooler:
    """The embeddings in progress. All ranks know about them; those that answer compute them."""

    def __init__(self, model: Qwen2) -> None:
        self._model = model
        self._open: dict[int, _PoolingState] = {}

    def open(self, opening: NewSequence) -> None:
        if opening.pooling is not None:
            self._open[opening.sequence] = _PoolingState(opening.pooling)

    def close(self, sequence: int) -> None:
        self._open.pop(sequence, None)

    def needs_all_tokens(self, works: Sequence[Work]) -> bool:
        """Whether any of the works needs the hidden states of more tokens than those that sample."""
        return bool(self._open) and any(work.sequence in self._open for work in works)

    def pool(self, hidden_TD: Tensor, built: BuiltBatch) -> tuple[PooledEmbedding, ...]:
        """The embeddings that this step completes. ``hidden_TD`` is what `Qwen2.hidden` returned."""
        return tuple(self._pool(hidden_TD, built)) if self._open else ()

    def _pool(self, hidden_TD: Tensor, built: BuiltBatch) -> Iterator[PooledEmbedding]:
        for work, first in zip(built.works, built.forward.query_starts, strict=False):
            pool = self._open.get(work.sequence)
            if pool is None:
                continue
            wanted = pool.wanted(work)
            if wanted:
                pool.add(self._model.normalise(hidden_TD[first + wanted.start : first + wanted.stop]))
            if work.pools:
                yield _pooled(work.sequence, pool.mean())


class _PoolingState:
    """The running mean of one sequence, over all its works."""

    def __init__(self, pooling: Pooling) -> None:
        self._kind = pooling.kind
        self._sum_D: Tensor | None = None
        self._count = 0

    def wanted(self, work: Work) -> range:
        """The tokens of the work that count."""
        count = len(work.tokens)
        if self._kind == "mean":
            return range(count)
        if self._kind == "first":
            return range(int(work.start == 0))
        return range(count - work.pools, count)

    def add(self, normed_RD: Tensor) -> None:
        sum_D = normed_RD.to(torch.float32).sum(0)
        self._sum_D = sum_D if self._sum_D is None else self._sum_D + sum_D
        self._count += len(normed_RD)

    def mean(self) -> Tensor:
        assert self._sum_D is not None
        return self._sum_D / self._count


def _pooled(sequence: int, vector_D: Tensor) -> PooledEmbedding:
    vector = vector_D.cpu()
    if not bool(vector.isfinite().all()):
        return PooledEmbedding(sequence, b"", fault=NOT_FINITE)
    return PooledEmbedding(sequence, vector.numpy().astype("<f4").tobytes())
