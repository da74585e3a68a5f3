"""Weight formats: how the weights of a linear layer are stored and multiplied. Formats and layers do not depend on each other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.axes import IN, OUT, Axis
from parallel.pinned_staging import staging_for

MAX_GEMV_ROWS = 2
"""Up to so many rows, a product is bound by reading the matrix; see `parallel.cuda.gemv`."""


@cache
def has_triton() -> bool:
    """Whether Triton, and with it the CUDA kernels, is installed."""
    return find_spec("triton") is not None


class StoredTensor(Protocol):
    """One tensor of a checkpoint, not read yet."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_bytes(self) -> int:
        """Size as stored."""
        ...

    @property
    def piece_dim(self) -> int:
        """The dim along which to read it piece by piece: the outermost one in the file."""
        ...

    @property
    def piece_bytes(self) -> int:
        """Recommended size of a piece, in bytes of its dtype, for callers that can process it piecewise."""
        ...

    def read(self, *slices: slice) -> Tensor:
        """The given part (one slice per dim) as a CPU tensor. Only its bytes are read from the file."""
        ...


@runtime_checkable
class ReadableInto(StoredTensor, Protocol):
    """A stored tensor that can be read directly into a given tensor, without a temporary copy."""

    def read_into(self, target: Tensor, *slices: slice) -> None:
        """As `StoredTensor.read`, but into a contiguous CPU tensor of that shape and dtype."""
        ...


PIECE_BYTES = 32 * 2**20
"""Size of the pieces in which a stored tensor is copied to its destination."""


def copy_part(stored: StoredTensor, slices: Sequence[slice], target: Tensor) -> int:
    """Copy a part of ``stored``, one slice per dim, into ``target`` of the same shape. Returns its size as stored, in bytes.

    It is copied in pieces, so that a large matrix is never in memory twice. Copies to a CUDA device are asynchronous: later work on the
    calling thread's stream sees the data.
    """
    if target.numel() == 0:
        return 0
    dim = stored.piece_dim
    wanted = range(*slices[dim].indices(stored.shape[dim]))
    one_bytes = target.numel() // len(wanted) * stored.dtype.itemsize
    staging = staging_for(target.device) if isinstance(stored, ReadableInto) else None
    if staging is not None and one_bytes > staging.buffer_bytes:
        staging = None
    step = max(1, (staging.buffer_bytes if staging else PIECE_BYTES) // one_bytes)
    for start in range(0, len(wanted), step):
        piece = wanted[start : start + step]
        destination = target.narrow(dim, start, len(piece))
        its_slices = (*slices[:dim], slice(piece.start, piece.stop), *slices[dim + 1 :])
        if staging is not None and isinstance(stored, ReadableInto):
            part = staging.next_buffer(tuple(destination.shape), stored.dtype)
            stored.read_into(part, *its_slices)
            staging.copy_to_device(part, destination)
        else:
            destination.copy_(stored.read(*its_slices))
    return stored.num_bytes * target.numel() // prod(stored.shape)


PIECE_MULTIPLE = 128
"""Pieces of a matrix begin at multiples of this many outputs or input features; no format has larger panels or groups."""


def stream_pieces(
    stored: StoredTensor, slices: tuple[slice, slice], load_piece: Callable[[int, int, Tensor], None], before: int = 0
) -> int:
    """Read a part of a matrix piece by piece and call ``load_piece(first_output, first_input, piece)`` for each; ``before`` is added to the
    outputs. Returns the part's size as stored, in bytes.

    A piece that has just been read is still in the processor's cache, and its memory is reused for the next one. Pieces of outputs end
    at panel borders, as completing a panel that another piece began costs as much as a whole panel.
    """
    spans = [range(*part.indices(size)) for part, size in zip(slices, stored.shape, strict=True)]
    if not all(spans):
        return 0
    dim = stored.piece_dim
    across_bytes = len(spans[1 - dim]) * stored.dtype.itemsize
    step = max(1, stored.piece_bytes // (across_bytes * PIECE_MULTIPLE)) * PIECE_MULTIPLE
    early = before % PIECE_MULTIPLE if dim == 0 else 0
    for start in range(-early, len(spans[dim]), step):
        piece = spans[dim][max(0, start) : start + step]
        wanted = slice(piece.start, piece.stop)
        if dim == 0:
            load_piece(before + max(0, start), 0, stored.read(wanted, slices[1]))
        else:
            load_piece(before, start, stored.read(slices[0], wanted))
    return stored.num_bytes * len(spans[0]) * len(spans[1]) // prod(stored.shape)


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a format: the logical axes of its dims, and its dtype in memory."""

    axes: tuple[Axis, ...]
    dtype: torch.dtype


class WeightFormat(Protocol):
    """How the matrix of ``out = in @ W.T`` is stored and multiplied."""

    @property
    def bytes_per_weight(self) -> float:
        """Memory per weight once loaded, including scales."""
        ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors that hold the matrix, by the suffix they have in a checkpoint (``weight``, ``qweight``, ...)."""
        ...

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called once after loading: returns the tensors as `multiply` needs them (repacked, transposed, or unchanged). The given tensors
        must not be used afterwards."""
        ...

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """``x`` (..., in) times the matrix plus ``bias`` (out): (..., out)."""
        ...

    def rows(self, outputs: Tensor, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        """The matrix's rows for these ``outputs`` (any shape, int64), ``width`` = in: (..., in). For embedding lookups."""
        ...


@runtime_checkable
class StreamingFormat(Protocol):
    """A `WeightFormat` that packs a plain matrix piece by piece while it is read, so that the stored form is never completely in memory."""

    def allocate(self, num_outputs: int, num_inputs: int) -> dict[str, Tensor]:
        """Uninitialised CPU tensors in the form that `WeightFormat.prepare` returns."""
        ...

    def load_piece(self, tensors: Mapping[str, Tensor], first_output: int, first_input: int, piece_NK: Tensor) -> None:
        """Pack a part of the matrix, from any output and from a multiple of `PIECE_MULTIPLE` input features on. Parts may come in any
        order and from several threads."""
        ...


def uses_gemv(x: Tensor) -> bool:
    """Whether a product with ``x`` (..., K) has so few rows that `parallel.cuda.gemv` handles it."""
    return x.device.type == "cuda" and 0 < x.numel() <= MAX_GEMV_ROWS * x.shape[-1] and has_triton()


@dataclass(frozen=True)
class Dense:
    """A plain matrix (out, in) in the model's dtype; the reference for every other format."""

    dtype: torch.dtype
    is_replicated: bool = False
    """Whether several ranks compute the same product and must get identical bits. Then the autotuned kernels are not used, as each rank may
    have measured a different one as the fastest."""

    @property
    def bytes_per_weight(self) -> float:
        return self.dtype.itemsize

    def specs(self) -> Mapping[str, TensorSpec]:
        return {"weight": TensorSpec((OUT, IN), self.dtype)}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        if not self.is_replicated and uses_gemv(x) and len(tensors["weight"]):
            from parallel.cuda.gemv import multiply  # imports triton, which may not be installed

            rows = x.reshape(-1, x.shape[-1])
            return multiply(rows, tensors, bias, lambda: F.linear(rows, tensors["weight"], bias)).view(*x.shape[:-1], -1)
        return F.linear(x, tensors["weight"], bias)

    def rows(self, outputs: Tensor, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        return F.embedding(outputs, tensors["weight"])
