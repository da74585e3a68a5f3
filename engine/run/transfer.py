"""Small arrays from the host to a rank's device and back."""

import numpy as np
import torch
from torch import Tensor

NUM_BUFFERS = 4
"""Used in turn. At most two steps are in flight, so nobody waits for a buffer."""


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on ``device``. The host does not wait for the copy; on the CPU there is none.

    The array must not be changed afterwards.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def refill(buffer: Tensor, array: np.ndarray) -> None:
    """Overwrite a tensor of the same shape and dtype, from which a captured step reads. The host does not wait for the copy.

    The array must not be changed afterwards.
    """
    tensor = torch.from_numpy(array)
    buffer.copy_(tensor if buffer.device.type == "cpu" else tensor.pin_memory(), non_blocking=True)


class Staging:
    """The numbers (int64) that every step uploads: written to pinned memory that is allocated once, and uploaded by one copy."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self.on_device = torch.zeros(shape, dtype=torch.int64, device=device)
        """Where a captured step reads them."""
        self._buffers = _BufferRing(shape, device)

    def next_host_array(self) -> np.ndarray:
        """The array to fill for the next upload. It still holds the numbers of an earlier step."""
        return self._buffers.next().array

    def upload(self) -> None:
        """Upload that array without waiting for the copy."""
        buffer = self._buffers.latest
        self.on_device.copy_(buffer.tensor, non_blocking=True)
        buffer.record()


class Readback:
    """The numbers (int64) that every step gives to the host."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._buffers = _BufferRing(tuple(source.shape), source.device)

    def start_copy(self) -> "PinnedBuffer":
        """Start to copy the output of the step that was launched last. The result is valid until `NUM_BUFFERS` more copies were started."""
        buffer = self._buffers.next()
        buffer.tensor.copy_(self._source, non_blocking=True)
        buffer.record()
        return buffer


class PinnedBuffer:
    """Pinned memory with an event that tells when the device is done with it."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.tensor = torch.zeros(shape, dtype=torch.int64, pin_memory=is_cuda)
        self.array: np.ndarray = self.tensor.numpy()
        self._device, self._event = device, torch.cuda.Event() if is_cuda else None

    def record(self) -> None:
        """Record the event after all work launched so far, even from a thread whose current device is another one."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def is_done(self) -> bool:
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class _BufferRing:
    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._all = [PinnedBuffer(shape, device) for _ in range(NUM_BUFFERS)]
        self._at = 0

    @property
    def latest(self) -> PinnedBuffer:
        return self._all[self._at]

    def next(self) -> PinnedBuffer:
        self._at = (self._at + 1) % NUM_BUFFERS
        self.latest.wait()
        return self.latest
