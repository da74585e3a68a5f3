"""Elementwise and row-wise kernels between matrix products, for float32 on a CPU. T rows, D model width, I width of an MLP."""

import torch
from torch import Tensor

from parallel.native.library import Native, num_threads


class NativeElementwise:
    """Implements `parallel.elementwise_kernels.ElementwiseKernels`."""

    def __init__(self, library: Native) -> None:
        self._library = library

    def add_norm(self, x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float) -> Tensor:
        assert x_TD.is_contiguous()
        out_TD = torch.empty_like(x_TD)
        delta_TD = None if delta_TD is None else delta_TD.contiguous()
        num_rows, width = x_TD.shape
        delta = None if delta_TD is None else delta_TD.data_ptr()
        self._library.add_norm(x_TD.data_ptr(), delta, weight_D.data_ptr(), out_TD.data_ptr(), num_rows, width, eps, num_threads())
        return out_TD

    def swiglu(self, gate_up_TX: Tensor) -> Tensor:
        gate_up_TX = gate_up_TX.contiguous()
        num_rows, width = gate_up_TX.shape[0], gate_up_TX.shape[1] // 2
        out_TI = torch.empty(num_rows, width)
        self._library.gate(gate_up_TX.data_ptr(), out_TI.data_ptr(), num_rows, width, num_threads())
        return out_TI

    def apply_rope(self, x_TXK: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
        num_tokens, num_heads, width = x_TXK.shape
        if x_TXK.stride()[1:] != (width, 1):
            x_TXK = x_TXK.contiguous()
        out_TXK = torch.empty(num_tokens, num_heads, width)
        self._library.rotate(
            *(x_TXK.data_ptr(), x_TXK.stride(0), cos_T1F.contiguous().data_ptr(), sin_T1F.contiguous().data_ptr(), out_TXK.data_ptr()),
            *(num_tokens, num_heads, width, num_threads()),
        )
        return out_TXK


def highest(library: Native, x_RN: Tensor) -> tuple[Tensor, Tensor]:
    """Argmax of each contiguous float32 row: value and index, the first among equals. A row that holds a NaN gives NaN and any index. N is
    at least 1."""
    assert x_RN.stride(1) == 1
    assert x_RN.shape[1]
    values_R, indices_R = x_RN.new_empty(len(x_RN)), torch.empty(len(x_RN), dtype=torch.int64)
    library.highest(x_RN.data_ptr(), x_RN.stride(0), values_R.data_ptr(), indices_R.data_ptr(), *x_RN.shape, num_threads())
    return values_R, indices_R


def candidates(library: Native, x_RN: Tensor, count: int, stretch: int) -> tuple[Tensor, Tensor]:
    """Top-k of each contiguous float32 row: the ``count`` highest values and their indices (R, count), in ascending order of index; ties at
    the threshold go to the lower index. ``stretch``: columns per block of the search. For a row that holds a NaN the result is meaningless,
    but the indices are valid."""
    assert x_RN.stride(1) == 1
    assert 0 < count <= x_RN.shape[1]
    values_RC, indices_RC = x_RN.new_empty(len(x_RN), count), torch.empty(len(x_RN), count, dtype=torch.int64)
    sizes = (*x_RN.shape, count, stretch, num_threads())
    library.candidates(x_RN.data_ptr(), x_RN.stride(0), values_RC.data_ptr(), indices_RC.data_ptr(), *sizes)
    return values_RC, indices_RC
