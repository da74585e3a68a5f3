"""How the weights of one linear layer are stored and multiplied. A format knows no layer, a layer knows no format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.axes import IN, OUT, Axis


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

    def read(self, *slices: slice) -> Tensor:
        """The given part (one slice per dim) as a CPU tensor; only its bytes are read from the file."""
        ...


PIECE_BYTES = 32 * 2**20
"""Of a stored tensor, held beside its final place while it is loaded."""


def copy_part(stored: StoredTensor, slices: Sequence[slice], target: Tensor) -> int:
    """Copy a part of ``stored``, one slice per dim, into ``target`` of the same shape. Returns its bytes as stored.

    It passes in pieces, so that nobody holds a large matrix twice.
    """
    if target.numel() == 0:
        return 0
    dim = stored.piece_dim
    wanted = range(*slices[dim].indices(stored.shape[dim]))
    step = max(1, PIECE_BYTES * len(wanted) // (target.numel() * stored.dtype.itemsize))
    for start in range(0, len(wanted), step):
        piece = wanted[start : start + step]
        part = stored.read(*slices[:dim], slice(piece.start, piece.stop), *slices[dim + 1 :])
        target.narrow(dim, start, len(piece)).copy_(part)
    return stored.num_bytes * target.numel() // prod(stored.shape)


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


@dataclass(frozen=True)
class Dense:
    """A plain matrix (out, in) in the model's own dtype; the oracle of every other format."""

    dtype: torch.dtype

    @property
    def bytes_per_weight(self) -> float:
        return self.dtype.itemsize

    def specs(self) -> Mapping[str, TensorSpec]:
        return {"weight": TensorSpec((OUT, IN), self.dtype)}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(x, tensors["weight"], bias)

    def rows(self, outputs: Tensor, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        return F.embedding(outputs, tensors["weight"])
