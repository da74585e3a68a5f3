"""How the weights of one linear layer are stored and multiplied. A format knows no layer, a layer knows no format."""

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
"""Rows whose product is nothing but reading a matrix; see `parallel.cuda.gemv`."""


@cache
def has_triton() -> bool:
    """Whether the kernels for CUDA devices can be had."""
    return find_spec("triton") is not None


class StoredTensor(Protocol):
    """One tensor of a checkpoint that has not been read yet."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def num_bytes(self) -> int:
        """As it is stored."""
        ...

    @property
    def piece_dim(self) -> int:
        """Along which it is best read piece by piece: the dim in whose order it lies in the file."""
        ...

    @property
    def piece_bytes(self) -> int:
        """Of it in its dtype, about so many are best read at once by whoever needs no more at a time."""
        ...

    def read(self, *slices: slice) -> Tensor:
        """The given part (one slice per dim) as a CPU tensor; only its bytes are read from the file."""
        ...


@runtime_checkable
class ReadableInto(StoredTensor, Protocol):
    """One whose bytes go from the file to where they are wanted, with nothing in between."""

    def read_into(self, place: Tensor, *slices: slice) -> None:
        """As `StoredTensor.read`, into a contiguous CPU tensor of that shape and dtype."""
        ...


PIECE_BYTES = 32 * 2**20
"""Of a stored tensor, held beside its final place while it is loaded."""


def copy_part(stored: StoredTensor, slices: Sequence[slice], target: Tensor) -> int:
    """Copy a part of ``stored``, one slice per dim, into ``target`` of the same shape. Returns its bytes as stored.

    It passes in pieces, so that nobody holds a large matrix twice. To a CUDA device it is on its way when this returns: what the calling
    thread's stream does next finds it there.
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
        place = target.narrow(dim, start, len(piece))
        its_slices = (*slices[:dim], slice(piece.start, piece.stop), *slices[dim + 1 :])
        if staging is not None and isinstance(stored, ReadableInto):
            part = staging.next_buffer(tuple(place.shape), stored.dtype)
            stored.read_into(part, *its_slices)
            staging.copy_to_device(part, place)
        else:
            place.copy_(stored.read(*its_slices))
    return stored.num_bytes * target.numel() // prod(stored.shape)


PIECE_MULTIPLE = 128
"""Pieces of a matrix begin at whole multiples of so many outputs or input features: no format has larger panels or groups."""


def stream_pieces(
    stored: StoredTensor, slices: tuple[slice, slice], load_piece: Callable[[int, int, Tensor], None], before: int = 0
) -> int:
    """Have ``load_piece`` a part of a matrix piece by piece, each with how many outputs and how many input features came before it: of the
    part, and ``before`` outputs of others. Returns the part's bytes as stored.

    A piece that has just been read is still in the processor's cache, and its memory serves the next one. Pieces of outputs end between
    panels, as to fill up one that another piece began costs as much as a whole one.
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
    """One named tensor of a format: its dims as logical axes, and its dtype once loaded."""

    axes: tuple[Axis, ...]
    dtype: torch.dtype


class WeightFormat(Protocol):
    """The stored form of ``out = in @ W.T``."""

    @property
    def bytes_per_weight(self) -> float:
        """Of memory once loaded, scales and all."""
        ...

    def specs(self) -> Mapping[str, TensorSpec]:
        """The tensors that hold the matrix, by the suffix they have in a checkpoint (``weight``, ``qweight``, ...)."""
        ...

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called once after loading: the tensors as `multiply` wants them (repacked, transposed, or the same). Those that were given
        are not to be read afterwards."""
        ...

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        """``x`` (..., in) times the matrix plus ``bias`` (out): (..., out)."""
        ...

    def rows(self, outputs: Tensor, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        """The matrix's rows of these ``outputs`` (any shape, int64), ``width`` = in: (..., in). For a table that is looked up."""
        ...


@runtime_checkable
class StreamingFormat(Protocol):
    """A `WeightFormat` of one plain matrix that brings parts of it into its own form as they come: nobody then holds it as it is stored."""

    def allocate(self, num_outputs: int, num_inputs: int) -> dict[str, Tensor]:
        """Tensors as of `WeightFormat.prepare`, on the CPU, in which nothing is yet."""
        ...

    def load_piece(self, tensors: Mapping[str, Tensor], first_output: int, first_input: int, piece_NK: Tensor) -> None:
        """A part of the matrix: from any output and from a multiple of `PIECE_MULTIPLE` input features on. Parts may come in any order and
        from several threads."""
        ...


def uses_gemv(x: Tensor) -> bool:
    """Whether a product of ``x`` (..., K) is one of `parallel.cuda.gemv`."""
    return x.device.type == "cuda" and 0 < x.numel() <= MAX_GEMV_ROWS * x.shape[-1] and has_triton()


@dataclass(frozen=True)
class Dense:
    """A plain matrix (out, in) in the model's own dtype; the oracle of every other format."""

    dtype: torch.dtype
    is_replicated: bool = False
    """Whether several ranks compute the same product and must come to the same bits: then nobody multiplies in the way that it happened to
    measure as the fastest."""

    @property
    def bytes_per_weight(self) -> float:
        return self.dtype.itemsize

    def specs(self) -> Mapping[str, TensorSpec]:
        return {"weight": TensorSpec((OUT, IN), self.dtype)}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        if not self.is_replicated and uses_gemv(x) and len(tensors["weight"]):
            from parallel.cuda.gemv import multiply  # triton: not to be imported where there is no such device

            rows = x.reshape(-1, x.shape[-1])
            return multiply(rows, tensors, bias, lambda: F.linear(rows, tensors["weight"], bias)).view(*x.shape[:-1], -1)
        return F.linear(x, tensors["weight"], bias)

    def rows(self, outputs: Tensor, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        return F.embedding(outputs, tensors["weight"])
