"""Small arrays from the host to a rank's device, and back."""

import numpy as np
import torch
from torch import Tensor

NUM_BUFFERS = 4
"""In turn: of steps two are under way at most, so that nobody waits for a place."""


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on ``device``; the host does not wait for the copy, and on the CPU there is none.

    The array must not be changed afterwards.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def refill(buffer: Tensor, array: np.ndarray) -> None:
    """Write the array over a tensor of the same shape and dtype, in whose place a captured step reads it; the host does not wait.

    The array must not be changed afterwards.
    """
    tensor = torch.from_numpy(array)
    buffer.copy_(tensor if buffer.device.type == "cpu" else tensor.pin_memory(), non_blocking=True)


class Staging:
    """Numbers that every step brings, int64: gathered in pinned memory that is there already, and brought by one copy."""

    def __init__(self, *shape: int, device: torch.device) -> None:
        self.on_device = torch.zeros(shape, dtype=torch.int64, device=device)
        """On the device, where a captured step reads them."""
        self._buffers = _BufferRing(shape, device)

    def next_host_array(self) -> np.ndarray:
        """Where to gather the next ones; what lies there is of some step before."""
        return self._buffers.next().array

    def upload(self) -> None:
        """What was gathered since, without waiting for the copy."""
        buffer = self._buffers.latest
        self.on_device.copy_(buffer.tensor, non_blocking=True)
        buffer.record()


class Readback:
    """What every step gives, int64, on its way to the host."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._buffers = _BufferRing(tuple(source.shape), source.device)

    def start_copy(self) -> "PinnedBuffer":
        """Begin to copy what the step gives that was begun last. It is there until so many others were sent (`NUM_BUFFERS`)."""
        buffer = self._buffers.next()
        buffer.tensor.copy_(self._source, non_blocking=True)
        buffer.record()
        return buffer


class PinnedBuffer:
    """Pinned memory, and whether the device is at it."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self.tensor = torch.zeros(shape, dtype=torch.int64, pin_memory=is_cuda)
        self.array: np.ndarray = self.tensor.numpy()
        self._device, self._event = device, torch.cuda.Event() if is_cuda else None

    def record(self) -> None:
        """All that the device was asked for until now is to be waited for: also by a thread to which another one is the current."""
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
