"""Small arrays from the host to a rank's device."""

import numpy as np
import torch
from torch import Tensor


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
