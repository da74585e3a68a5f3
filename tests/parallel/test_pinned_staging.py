"""Copies through two alternating buffers: the result equals the stored tensor for any piece size."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from parallel import weight_format
from parallel.pinned_staging import PinnedStaging, staging_for
from parallel.weight_format import ReadableInto, copy_part
from tests.parallel.memory_tensor import MemoryTensor


class IntoTensor(MemoryTensor):
    """A stored tensor that can be read into, like a file's."""

    def read_into(self, target: Tensor, *slices: slice) -> None:
        assert target.is_contiguous()
        target.copy_(self.read(*slices))


@dataclass
class Fetched:
    """A CUDA event of a device that copies as late as possible: only when the event is waited for or recorded again."""

    late: list[tuple[Tensor, Tensor]]

    def record(self, _stream: object) -> None:
        pass

    def synchronize(self) -> None:
        for piece, target in self.late:
            target.copy_(piece)
        self.late.clear()


class LatePinnedStaging(PinnedStaging):
    """Copies to the device happen as late as allowed: a piece that is overwritten too early arrives as its successor."""

    def __init__(self, staged_bytes: int) -> None:
        super().__init__(torch.device("cpu"), staged_bytes)
        self._fetched = [Fetched([]) for _ in self._pieces]  # type: ignore[misc]

    def copy_to_device(self, piece: Tensor, target: Tensor) -> None:
        self._fetched[self._turn].late.append((piece, target))  # type: ignore[union-attr]

    def finish(self) -> None:
        for fetched in self._fetched:
            fetched.synchronize()  # type: ignore[union-attr]


@pytest.mark.parametrize("slices", [(slice(0, 50), slice(0, 6)), (slice(7, 31), slice(2, 5))], ids=["whole", "part"])
@pytest.mark.parametrize("staged_bytes", [24, 100, 4096])
def test_the_copied_tensor_equals_the_stored_one(monkeypatch: pytest.MonkeyPatch, slices: tuple[slice, slice], staged_bytes: int) -> None:
    matrix = torch.randn(50, 6)
    stored, staging = IntoTensor("matrix", matrix), LatePinnedStaging(staged_bytes)
    assert isinstance(stored, ReadableInto)
    monkeypatch.setattr(weight_format, "staging_for", lambda _device: staging)
    target = torch.full_like(matrix[slices], torch.nan)
    assert copy_part(stored, slices, target) == target.nbytes
    staging.finish()
    assert torch.equal(target, matrix[slices])


def test_a_row_larger_than_the_buffer_is_copied_without_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(5, 40)
    monkeypatch.setattr(weight_format, "staging_for", lambda _device: LatePinnedStaging(24))
    target = torch.empty_like(matrix)
    copy_part(IntoTensor("matrix", matrix), (slice(None), slice(None)), target)
    assert torch.equal(target, matrix)


def test_nothing_is_staged_for_a_cpu() -> None:
    assert staging_for(torch.device("cpu")) is None
