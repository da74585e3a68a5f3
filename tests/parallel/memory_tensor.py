"""A checkpoint tensor in memory that records what was read of it."""

from torch import Tensor, dtype


class MemoryTensor:
    piece_bytes = 4096

    def __init__(self, name: str, tensor: Tensor) -> None:
        self._name, self._tensor = name, tensor
        self.num_read = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._tensor.shape)

    @property
    def dtype(self) -> dtype:
        return self._tensor.dtype

    @property
    def num_bytes(self) -> int:
        return self._tensor.nbytes

    @property
    def piece_dim(self) -> int:
        return 0

    def read(self, *slices: slice) -> Tensor:
        part = self._tensor[slices]
        self.num_read += part.numel()
        return part
