"""Copies checkpoint pieces to a GPU through pinned host memory, with two buffers: one is read into while the other is being copied.

A copy from pageable memory goes through the driver's small staging buffers and blocks the caller.
"""

from math import prod
from threading import local

import torch
from torch import Tensor

STAGING_BYTES = 8 * 2**20
"""Size of one buffer. Each thread has two; pinned memory is kept for the life of the process."""


class PinnedStaging:
    """Two pinned buffers of one thread, used alternately."""

    def __init__(self, device: torch.device, staged_bytes: int = STAGING_BYTES) -> None:
        on_device = device.type == "cuda"
        self._device, self._turn = device, 0
        self._pieces = [torch.empty(staged_bytes, dtype=torch.uint8, pin_memory=on_device) for _ in range(2)]
        self._fetched = [torch.cuda.Event() if on_device else None for _ in self._pieces]

    def __repr__(self) -> str:
        return f"<PinnedStaging [{len(self._pieces)} x {self.buffer_bytes} bytes to {self._device}]>"

    @property
    def buffer_bytes(self) -> int:
        """Size of one buffer."""
        return self._pieces[0].nbytes

    def next_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The CPU tensor to write the next piece into; waits until the device has fetched its previous contents. It must not be written
        to any more once `copy_to_device` was called."""
        self._turn = 1 - self._turn
        if (fetched := self._fetched[self._turn]) is not None:
            fetched.synchronize()
        return self._pieces[self._turn][: prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def copy_to_device(self, piece: Tensor, target: Tensor) -> None:
        """Start copying ``piece``, from the latest `next_buffer`, to ``target`` without waiting. Later work on this thread's current
        stream sees it."""
        target.copy_(piece, non_blocking=True)
        if (fetched := self._fetched[self._turn]) is not None:
            fetched.record(torch.cuda.current_stream(self._device))


_of_thread = local()


def staging_for(device: torch.device) -> PinnedStaging | None:
    """This thread's staging buffers, freed with the thread; None for devices other than CUDA."""
    if device.type != "cuda":
        return None
    kept: dict[torch.device, PinnedStaging] = _of_thread.__dict__.setdefault("kept", {})
    if device not in kept:
        kept[device] = PinnedStaging(device)
    return kept[device]
