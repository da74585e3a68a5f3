"""Rows with as many columns as ids can be sampled (Qwen2: 151,665, a multiple of nothing), laid so that kernels take 16 bytes at a time.

Triton does so where it knows that rows begin, and masks end, at whole 16 elements; else it takes one element at a time.
"""

import torch
from torch import Tensor

ALIGNMENT = 16
"""Elements: of a number that is a multiple of it Triton knows that."""


def empty_rows(num_rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(num_rows, width), uninitialised: rows begin at whole `ALIGNMENT`s, and what lies between them belongs to nobody."""
    return torch.empty(num_rows, -(-width // ALIGNMENT) * ALIGNMENT, dtype=dtype, device=device)[:, :width]


def readable_columns(x_RV: Tensor) -> int:
    """To which column (exclusive) memory may be read in every row, for a kernel that then ignores what stands behind the last one: the next
    whole `ALIGNMENT` if rows begin at such and the memory of the last one goes on so far, else V."""
    num_rows, width = x_RV.shape
    whole = -(-width // ALIGNMENT) * ALIGNMENT
    end = x_RV.storage_offset() + (num_rows - 1) * x_RV.stride(0) + whole
    goes_on = end * x_RV.element_size() <= x_RV.untyped_storage().nbytes()
    return whole if goes_on and x_RV.stride(0) % ALIGNMENT == 0 else width
