"""From files to a device: a piece is read into memory that the device fetches from by itself, while it still fetches the one before.

A copy from ordinary memory goes through the driver's own small buffers, and who asks for it waits.
"""

from math import prod
from threading import local

import torch
from torch import Tensor

STAGING_BYTES = 8 * 2**20
"""Of one piece. A thread has two, and what a process has pinned once it keeps."""


class PinnedStaging:
    """Two pieces of one thread, by turns."""

    def __init__(self, device: torch.device, staged_bytes: int = STAGING_BYTES) -> None:
        on_device = device.type == "cuda"
        self._device, self._turn = device, 0
        self._pieces = [torch.empty(staged_bytes, dtype=torch.uint8, pin_memory=on_device) for _ in range(2)]
        self._fetched = [torch.cuda.Event() if on_device else None for _ in self._pieces]

    def __repr__(self) -> str:
        return f"<PinnedStaging [{len(self._pieces)} x {self.most_bytes} bytes to {self._device}]>"

    @property
    def most_bytes(self) -> int:
        """Of a piece."""
        return self._pieces[0].nbytes

    def place(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Where the next piece is to be written, on the CPU, as soon as the device has fetched what was there. It is ``bring``'s alone
        once that is called."""
        self._turn = 1 - self._turn
        if (fetched := self._fetched[self._turn]) is not None:
            fetched.synchronize()
        return self._pieces[self._turn][: prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def bring(self, piece: Tensor, target: Tensor) -> None:
        """Have the device fetch the piece of the latest `place`, without waiting for it. What the thread's stream does next finds it."""
        target.copy_(piece, non_blocking=True)
        if (fetched := self._fetched[self._turn]) is not None:
            fetched.record(torch.cuda.current_stream(self._device))


_of_thread = local()


def staging_for(device: torch.device) -> PinnedStaging | None:
    """This thread's, which goes with the thread; None for a device that has the host's memory as its own."""
    if device.type != "cuda":
        return None
    kept: dict[torch.device, PinnedStaging] = _of_thread.__dict__.setdefault("kept", {})
    if device not in kept:
        kept[device] = PinnedStaging(device)
    return kept[device]
