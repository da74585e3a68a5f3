"""Vocabulary-parallel embedding and LM head: the matrix is split over ranks by rows."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from parallel.axes import split
from parallel.collectives import all_gather, all_reduce
from parallel.groups import Group
from parallel.linear import ShapeMismatch, Slot
from parallel.native.screened import TopLogits
from parallel.packed_format import PackedFormat
from parallel.screened_head import ScreenedHead, screened_head
from parallel.weight_format import Dense, StoredTensor, StreamingFormat, WeightFormat, copy_part, stream_pieces


class VocabEmbedding(nn.Module):
    """The embedding matrix (V, D), of which each rank holds a contiguous share of rows.

    ``format`` stores them, so that a tied head multiplies by the same tensors; None: unquantised in ``dtype``.
    """

    def __init__(self, *, vocab_size: int, hidden_size: int, group: Group, dtype: torch.dtype, format: WeightFormat | None = None) -> None:
        super().__init__()
        self.share = split(vocab_size, group.rank, group.size)
        self.vocab_size, self.hidden_size, self.group, self.dtype = vocab_size, hidden_size, group, dtype
        self.format = format or Dense(dtype)
        self.tensors: dict[str, Tensor] = {}

    def slots(self) -> Iterator[Slot]:
        yield Slot("", "weight", (self.vocab_size, self.hidden_size))

    @property
    def is_streaming(self) -> bool:
        return isinstance(self.format, StreamingFormat)

    def allocate(self, device: torch.device) -> None:
        if isinstance(self.format, StreamingFormat):
            self.tensors = self.format.allocate(len(self.share), self.hidden_size)
            return
        (spec,) = self.format.specs().values()
        self.tensors = {"weight": torch.empty(len(self.share), self.hidden_size, dtype=spec.dtype, device=device)}

    def load(self, part: str, tensor: str, stored: StoredTensor) -> int:
        if stored.shape != (self.vocab_size, self.hidden_size):
            raise ShapeMismatch(stored.name, stored.shape, (self.vocab_size, self.hidden_size))
        (span,) = self.share.stored(1)
        if isinstance(self.format, StreamingFormat):
            return stream_pieces(stored, (span, slice(None)), partial(self.format.load_piece, self.tensors))
        return copy_part(stored, (span, slice(None)), self.tensors["weight"])

    def finish(self) -> None:
        """Hand the rows to the format, which may repack them."""
        if not self.is_streaming:
            self.tensors = self.format.prepare(self.tensors)

    def forward(self, tokens_T: Tensor) -> Tensor:
        """(T, D). A rank that does not hold a token's row contributes zeros to the all-reduce."""
        if self.group.size == 1:
            return self._rows(tokens_T)
        (span,) = self.share.spans
        if isinstance(self.format, PackedFormat) and len(span):
            found = self.format.local_rows(tokens_T, self.tensors, self.hidden_size, span.start)
            if found is not None:
                return all_reduce(found.to(self.dtype), self.group)
        local = tokens_T - span.start
        held = (local >= 0) & (local < len(span))
        if len(span) == 0:  # more ranks than rows: there is no local row to look up
            nothing = torch.zeros(*tokens_T.shape, self.hidden_size, dtype=self.dtype, device=tokens_T.device)
            return all_reduce(nothing, self.group)
        rows = self._rows(local.where(held, 0)) * held.unsqueeze(-1)
        return all_reduce(rows, self.group)

    def multiply(self, x_RD: Tensor) -> Tensor:
        """(R, this rank's share of V): the product with every row."""
        return self.format.multiply(x_RD, self.tensors, None)

    def _rows(self, tokens_T: Tensor) -> Tensor:
        return self.format.rows(tokens_T, self.tensors, self.hidden_size).to(self.dtype)


class VocabHead(nn.Module):
    """LM head: hidden states (R, D) to logits (R, V) on every rank of the group, with the embedding's matrix (``tied``) or its own."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        group: Group,
        dtype: torch.dtype,
        tied: VocabEmbedding | None,
        format: WeightFormat | None = None,
    ) -> None:
        super().__init__()
        own = VocabEmbedding(vocab_size=vocab_size, hidden_size=hidden_size, group=group, dtype=dtype, format=format)
        self.rows = tied if tied is not None else own
        self.is_tied = tied is not None
        self.group = group
        self.sizes = [len(split(vocab_size, rank, group.size)) for rank in range(group.size)]
        self.screened: ScreenedHead | None = None
        """If not None, rows that need only a few of their logits may get only those exactly."""

    def enable_screening(self) -> None:
        """Use a `ScreenedHead` if the loaded matrix supports one. Only for float32 logits, as logits of fewer bits might tie with the
        required ones, and only on a single rank, as with several only one knows which logits are required."""
        if self.group.size == 1 and self.rows.dtype == torch.float32:
            self.screened = screened_head(self.rows.format, self.rows.tensors)

    def forward(self, x_RD: Tensor, top_logits: TopLogits | None = None) -> Tensor:
        """(R, V). With ``top_logits``, possibly only those are exact, and all others lower."""
        some = self.screened.multiply(x_RD, top_logits) if self.screened is not None and top_logits is not None else None
        return all_gather(self.rows.multiply(x_RD) if some is None else some, self.group, dim=-1, sizes=self.sizes)
