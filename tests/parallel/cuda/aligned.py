"""Rows as `parallel.aligned_rows` lays them, with what nobody may look at between them."""

import torch
from torch import Tensor

from parallel.aligned_rows import ALIGNMENT


def aligned(x_RV: Tensor) -> Tensor:
    """The same, every row at a whole unit; what lies behind is NaN."""
    num_rows, width = x_RV.shape
    whole = torch.full((num_rows, -(-width // ALIGNMENT) * ALIGNMENT), torch.nan, dtype=x_RV.dtype, device=x_RV.device)
    whole[:, :width] = x_RV
    return whole[:, :width]
