"""The vocabulary, shared over ranks by rows: token ids to vectors, and vectors to logits."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.axes import split
from parallel.collectives import all_gather, all_reduce
from parallel.groups import Group
from parallel.linear import ShapeMismatch, Slot
from parallel.weight_format import StoredTensor, copy_part


class VocabEmbedding(nn.Module):
    """Rows of the embedding matrix (V, D), each rank holding a contiguous share of the vocabulary."""

    def __init__(self, *, vocab_size: int, hidden_size: int, group: Group, dtype: torch.dtype) -> None:
        super().__init__()
        self.share = split(vocab_size, group.rank, group.size)
        self.vocab_size, self.hidden_size, self.group, self.dtype = vocab_size, hidden_size, group, dtype
        self.weight: Tensor | None = None

    def slots(self) -> Iterator[Slot]:
        yield Slot("", "weight", (self.vocab_size, self.hidden_size))

    def allocate(self, device: torch.device) -> None:
        self.weight = torch.empty(len(self.share), self.hidden_size, dtype=self.dtype, device=device)

    def load(self, part: str, tensor: str, stored: StoredTensor) -> int:
        assert self.weight is not None
        if stored.shape != (self.vocab_size, self.hidden_size):
            raise ShapeMismatch(stored.name, stored.shape, (self.vocab_size, self.hidden_size))
        (span,) = self.share.stored(1)
        return copy_part(stored, (span, slice(None)), self.weight)

    def finish(self) -> None:
        """Rows are looked up one by one: nothing to repack."""

    def forward(self, tokens_T: Tensor) -> Tensor:
        """(T, D): a rank that does not hold a token's row adds zero to the sum."""
        assert self.weight is not None
        if self.group.size == 1:
            return F.embedding(tokens_T, self.weight)
        (span,) = self.share.spans
        local = tokens_T - span.start
        held = (local >= 0) & (local < len(span))
        if len(span) == 0:  # more ranks than rows: no row to look up in place of one held elsewhere
            return all_reduce(self.weight.new_zeros(*tokens_T.shape, self.hidden_size), self.group)
        rows = F.embedding(local.where(held, 0), self.weight) * held.unsqueeze(-1)
        return all_reduce(rows, self.group)


class VocabHead(nn.Module):
    """Hidden states (R, D) to logits (R, V) on every rank of the group, from either the embedding's rows or its own."""

    def __init__(self, *, vocab_size: int, hidden_size: int, group: Group, dtype: torch.dtype, tied: VocabEmbedding | None) -> None:
        super().__init__()
        self.rows = tied if tied is not None else VocabEmbedding(vocab_size=vocab_size, hidden_size=hidden_size, group=group, dtype=dtype)
        self.is_tied = tied is not None
        self.group = group
        self.sizes = [len(split(vocab_size, rank, group.size)) for rank in range(group.size)]

    def forward(self, x_RD: Tensor) -> Tensor:
        assert self.rows.weight is not None
        return all_gather(F.linear(x_RD, self.rows.weight), self.group, dim=-1, sizes=self.sizes)
