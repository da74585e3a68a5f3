"""Rows of logits laid out so that Triton loads 16 bytes at a time, although their width is odd (Qwen2 can sample 151,665 ids).

Triton vectorises loads only if it knows that rows begin, and masks end, at multiples of 16 elements; else it loads single elements.
"""

import torch
from torch import Tensor

ALIGNMENT = 16
"""In elements: Triton specialises kernels on arguments divisible by it."""


def empty_rows(num_rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(num_rows, width), uninitialised: rows begin at multiples of `ALIGNMENT`, with unused padding between them."""
    return torch.empty(num_rows, -(-width // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)[:, :width]


def readable_columns(x_RV: Tensor) -> int:
    """Number of columns that a kernel may read in every row, if it ignores those from V on: V rounded up to `ALIGNMENT` if rows are aligned
    and the allocation extends that far behind the last row, else V."""
    num_rows, width = x_RV.shape
    whole = -(-width // ALIGNMENT) * ALIGNMENT
    end = x_RV.storage_offset() + (num_rows - 1) * x_RV.stride(0) + whole
    goes_on = end * x_RV.element_size() <= x_RV.untyped_storage().nbytes()
    return whole if goes_on and x_RV.stride(0) % ALIGNMENT == 0 else width
