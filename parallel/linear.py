"""Tensor-parallel linear layer: each rank holds a part of the matrix, split by output or by input features."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from parallel.axes import OUT, Share
from parallel.collectives import all_reduce
from parallel.groups import Group
from parallel.weight_format import StoredTensor, StreamingFormat, TensorSpec, WeightFormat, copy_part, stream_pieces


class ShapeMismatch(ValueError):
    """A checkpoint tensor does not have the shape that the model expects."""

    def __init__(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        super().__init__(f"{name}: shape {list(found)} in the checkpoint, {list(wanted)} in the model")
        self.name, self.found, self.wanted = name, found, wanted


@dataclass(frozen=True)
class Slot:
    """A parameter to be loaded from one checkpoint tensor, with the full (unsharded) shape of that tensor."""

    part: str
    tensor: str
    shape: tuple[int, ...]


class Linear(nn.Module):
    """``y = x @ W.T + b``, sharded by logical axis.

    ``out_parts`` are the checkpoint matrices fused into this one, in order, with this rank's share of the output features of each:
    ``{"q": ..., "k": ..., "v": ...}``. ``in_share`` is this rank's share of the input features. With ``reduce`` (row parallelism) the
    partial results are all-reduced over that group, and the bias is added once, after the sum. `allocate` allocates the tensors.
    """

    def __init__(
        self,
        *,
        in_share: Share,
        out_parts: Mapping[str, Share],
        bias: bool,
        format: WeightFormat,
        bias_dtype: torch.dtype,
        reduce: Group | None = None,
    ) -> None:
        super().__init__()
        self.in_share = in_share
        self.out_parts = dict(out_parts)
        self.format = format
        self.reduce = reduce
        self.has_bias = bias
        self._specs: dict[str, TensorSpec] = dict(format.specs())
        if bias:
            self._specs["bias"] = TensorSpec((OUT,), bias_dtype)
        self.tensors: dict[str, Tensor] = {}

    def slots(self) -> Iterator[Slot]:
        """Every checkpoint tensor that this layer needs, with its full shape."""
        for part, share in self.out_parts.items():
            for name, spec in self._specs.items():
                yield Slot(part, name, tuple(self._stored_size(axis.name, axis.pack, share) for axis in spec.axes))

    @property
    def is_streaming(self) -> bool:
        """Whether weights are packed while they are loaded, so that `finish` has nothing to do."""
        return isinstance(self.format, StreamingFormat)

    def allocate(self, device: torch.device) -> None:
        """Allocate this rank's share of the weights, uninitialised."""
        for name, spec in self._specs.items():
            shape = tuple(self._local_size(axis.name, axis.pack) for axis in spec.axes)
            if name == "weight" and isinstance(self.format, StreamingFormat):
                self.tensors |= self.format.allocate(*shape)
            else:
                self.tensors[name] = torch.empty(shape, dtype=spec.dtype, device=device)

    def load(self, part: str, tensor: str, stored: StoredTensor) -> int:
        """Load this rank's share of ``stored``. Returns the number of bytes read.

        Raises:
            ShapeMismatch: the full tensor does not have the expected shape.
        """
        spec = self._specs[tensor]
        out_share = self.out_parts[part]
        wanted = tuple(self._stored_size(axis.name, axis.pack, out_share) for axis in spec.axes)
        if stored.shape != wanted:
            raise ShapeMismatch(stored.name, stored.shape, wanted)
        if tensor == "weight" and isinstance(self.format, StreamingFormat):
            (outputs,), (inputs,) = out_share.stored(1), self.in_share.stored(1)
            return stream_pieces(stored, (outputs, inputs), partial(self.format.load_piece, self.tensors), self._offset(part, 1))
        slices = []
        target = self.tensors[tensor]
        for dim, axis in enumerate(spec.axes):
            share = out_share if axis.name == "out" else self.in_share
            (span,) = share.stored(axis.pack)
            slices.append(span)
            if axis.name == "out":
                target = target.narrow(dim, self._offset(part, axis.pack), span.stop - span.start)
        return copy_part(stored, slices, target)

    def finish(self) -> None:
        """Let the format repack the loaded tensors."""
        if self.is_streaming:
            return
        bias = self.tensors.pop("bias", None)
        self.tensors = self.format.prepare(self.tensors)
        if bias is not None:
            self.tensors["bias"] = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). With ``reduce`` the ranks' partial results are summed."""
        bias = self.tensors.get("bias")
        if self.reduce is None:
            return self.format.multiply(x, self.tensors, bias)
        return self.summed(self.format.multiply(x, self.tensors, None))

    def summed(self, y: Tensor) -> Tensor:
        """All-reduce this rank's partial result ``y`` (without bias), if ``reduce`` is set, and add the bias once."""
        bias = self.tensors.get("bias")
        y = y if self.reduce is None else all_reduce(y, self.reduce)
        return y if bias is None else y + bias

    @property
    def out_sizes(self) -> list[int]:
        """Output features of each part on this rank, for ``y.split(layer.out_sizes, dim=-1)``."""
        return [len(share) for share in self.out_parts.values()]

    def _stored_size(self, axis: str, pack: int, out_share: Share) -> int:
        size = out_share.size if axis == "out" else self.in_share.size
        return -(-size // pack)

    def _local_size(self, axis: str, pack: int) -> int:
        shares = self.out_parts.values() if axis == "out" else (self.in_share,)
        return sum(part.stop - part.start for share in shares for part in share.stored(pack))

    def _offset(self, part: str, pack: int) -> int:
        """Where ``part`` begins in the fused output axis, in stored elements."""
        offset = 0
        for name, share in self.out_parts.items():
            if name == part:
                return offset
            offset += sum(span.stop - span.start for span in share.stored(pack))
        raise KeyError(part)
