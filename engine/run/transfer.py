"""Small arrays from the host to a rank's device, and back."""

import numpy as np
import torch
from torch import Tensor

PLACES = 4
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
        self.there = torch.zeros(shape, dtype=torch.int64, device=device)
        """On the device, where a captured step reads them."""
        self._places = _Places(shape, device)

    def take(self) -> np.ndarray:
        """Where to gather the next ones; what lies there is of some step before."""
        return self._places.next().array

    def bring(self) -> None:
        """What was gathered since, without waiting for the copy."""
        place = self._places.latest
        self.there.copy_(place.tensor, non_blocking=True)
        place.record()


class Returns:
    """What every step gives, int64, on its way to the host."""

    def __init__(self, of_step: Tensor) -> None:
        self._of_step = of_step
        self._places = _Places(tuple(of_step.shape), of_step.device)

    def send(self) -> "Place":
        """Begin to copy what the step gives that was begun last. It is there until so many others were sent (`PLACES`)."""
        place = self._places.next()
        place.tensor.copy_(self._of_step, non_blocking=True)
        place.record()
        return place


class Place:
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


class _Places:
    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self._all = [Place(shape, device) for _ in range(PLACES)]
        self._at = 0

    @property
    def latest(self) -> Place:
        return self._all[self._at]

    def next(self) -> Place:
        self._at = (self._at + 1) % PLACES
        self.latest.wait()
        return self.latest
