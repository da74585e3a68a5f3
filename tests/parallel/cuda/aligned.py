"""Rows aligned as by `parallel.aligned_rows`, with padding that must not be read."""

import torch
from torch import Tensor

from parallel.aligned_rows import ALIGNMENT


def aligned(x_RV: Tensor) -> Tensor:
    """The same values in aligned rows, with NaN as padding."""
    num_rows, width = x_RV.shape
    whole = torch.full((num_rows, -(-width // ALIGNMENT) * ALIGNMENT), torch.nan, dtype=x_RV.dtype, device=x_RV.device)
    whole[:, :width] = x_RV
    return whole[:, :width]
