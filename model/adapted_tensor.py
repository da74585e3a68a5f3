"""One tensor of a model with an adapter, read lazily. N outputs, K input features, R ranks of the adapter."""

from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from model.checkpoint import FileTensor
from model.checkpoint_error import CheckpointError
from model.terminal_safe import terminal_safe
from parallel.weight_format import StoredTensor

KEPT_READS = 32
"""Cached shares of A and B: at least those of all matrices that are read at the same time."""


class ReadCache:
    """A cache of the parts of the adapter that were read last.

    A matrix is read in pieces, and each piece needs all of A or all of B. Thread-safe.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int, int, int], Tensor] = OrderedDict()
        self._lock = Lock()

    def read(self, stored: FileTensor, rows: slice, columns: slice) -> Tensor:
        """The part in float32.

        Raises:
            CheckpointError: it cannot be read, or holds NaN or infinity.
        """
        key = (stored.name, rows.start, rows.stop, columns.start, columns.stop)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        read = stored.read(rows, columns).float()
        if not torch.isfinite(read).all():
            raise non_finite(stored)
        with self._lock:
            self._kept[key] = read
            while len(self._kept) > KEPT_READS:
                self._kept.popitem(last=False)
        return read

    def forget(self) -> None:
        with self._lock:
            self._kept.clear()


@dataclass(frozen=True)
class LowRankFactor:
    """One side of a product B A, possibly that of one expert in a tensor that holds several."""

    stored: FileTensor
    rank_dim: int
    """Which of its dims is the rank; the other is the outputs, or the input features."""
    ranks: slice
    first: int = 0
    """Offset in the other dim."""

    def read(self, span: slice, kept: ReadCache) -> Tensor:
        """(R, len(span)) in float32."""
        wanted = slice(self.first + span.start, self.first + span.stop)
        if self.rank_dim == 0:
            return kept.read(self.stored, self.ranks, wanted)
        return kept.read(self.stored, wanted, slice(0, self.stored.shape[1]))[:, self.ranks].T


@dataclass(frozen=True)
class LowRankProduct:
    """scale * B A."""

    outputs: LowRankFactor
    inputs: LowRankFactor
    scale: float
    kept: ReadCache

    def added_to(self, part_NK: Tensor, outputs: slice, inputs: slice) -> Tensor:
        """The sum of ``part_NK`` and this part of the product, in float32."""
        return torch.addmm(part_NK, self.outputs.read(outputs, self.kept).T, self.inputs.read(inputs, self.kept), alpha=self.scale)


@dataclass(frozen=True)
class ReplacedRows:
    """Single rows of a matrix that the adapter replaces."""

    numbers: tuple[int, ...]
    stored: FileTensor
    kept: ReadCache

    def put_into(self, part: Tensor, outputs: slice, inputs: slice) -> None:
        """Write the rows that are in this part of the matrix."""
        here = [index for index, number in enumerate(self.numbers) if outputs.start <= number < outputs.stop]
        if here:
            rows = self.kept.read(self.stored, slice(0, self.stored.shape[0]), inputs)
            part[[self.numbers[index] - outputs.start for index in here]] = rows[here].to(part.dtype)


@dataclass(frozen=True)
class AdaptedTensor:
    """A `parallel.weight_format.ReadableInto`: one tensor of the model with the adapter merged, in the dtype of the base.

    Each part is summed in float32 and rounded once.
    """

    name: str
    stored: StoredTensor
    """The base's tensor, or the adapter's replacement for it."""
    dtype: torch.dtype
    product: LowRankProduct | None = None
    magnitude_N: FileTensor | None = None
    rows: ReplacedRows | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes

    @property
    def piece_dim(self) -> int:
        return self.stored.piece_dim

    @property
    def piece_bytes(self) -> int:
        return self.stored.piece_bytes

    def read(self, *slices: slice) -> Tensor:
        """The given part as a CPU tensor.

        Raises:
            CheckpointError: a file cannot be read, or the sum is not finite.
        """
        spans = [slice(*part.indices(size)) for part, size in zip(slices or (slice(None),) * len(self.shape), self.shape, strict=True)]
        part = self.stored.read(*spans) if self.product is None else self._sum(self.product, *spans)
        rounded = part.to(self.dtype)
        if self.rows is not None:
            self.rows.put_into(rounded, *spans)
        if not torch.isfinite(rounded).all():
            raise CheckpointError(f"{self.name} with its adapter is not finite in {self.dtype}", file=self.stored.name, tensor=self.name)
        return rounded

    def read_into(self, target: Tensor, *slices: slice) -> None:
        """Like `read`, into a contiguous CPU tensor of that shape and dtype."""
        target.copy_(self.read(*slices))

    def _sum(self, product: LowRankProduct, outputs: slice, inputs: slice) -> Tensor:
        part_NK = product.added_to(self.stored.read(outputs, inputs).float(), outputs, inputs)
        if self.magnitude_N is None:
            return part_NK
        every = slice(0, self.shape[1])
        whole_NK = part_NK if inputs.stop - inputs.start == every.stop else self._whole(product, outputs, every)
        lengths_N = torch.linalg.vector_norm(whole_NK, dim=1)
        scale_N: Tensor = self.magnitude_N.read(outputs).float() / lengths_N
        return part_NK * scale_N.unsqueeze(1)

    def _whole(self, product: LowRankProduct, outputs: slice, every: slice) -> Tensor:
        return product.added_to(self.stored.read(outputs, every).float(), outputs, every)


def non_finite(tensor: FileTensor) -> CheckpointError:
    return tensor_error(tensor, "holds NaN or infinity")


def tensor_error(tensor: FileTensor, what: str) -> CheckpointError:
    return CheckpointError(f"{tensor.source.name}: {terminal_safe(tensor.name)} {what}", file=tensor.source.name, tensor=tensor.name)
