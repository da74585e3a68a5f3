"""All experts of a layer in one call: N rows, A assignments sorted by expert, D model width, I inner width of an expert."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from parallel.native.library import Native, num_threads
from parallel.native.linear import Packed


def experts(
    library: Native, x_ND: Tensor, rows_A: Tensor | None, counts: Sequence[int], up: Sequence[Packed], down: Sequence[Packed]
) -> Tensor:
    """(A, D): each assignment's ``down(silu(gate) * up)``, in order. The first ``counts[0]`` of them use the first expert, and so on.

    ``rows_A`` (int64) says which row of ``x_ND`` an assignment is; None: each row is one. Threads take pieces of all experts'
    matrices alike, so that none waits for an expert that has many rows.
    """
    x_ND = x_ND.float().contiguous()
    rows_A = None if rows_A is None else rows_A.contiguous()
    inner_width, width = up[0].num_outputs // 2, down[0].num_outputs
    out_AD = torch.empty(sum(counts), width)
    counts_E = np.array(counts, np.int64)
    up_E, up_scales_E = _addresses(up)
    down_E, down_scales_E = _addresses(down)
    library.experts[up[0].kind](
        *(x_ND.data_ptr(), x_ND.shape[0], None if rows_A is None else rows_A.data_ptr(), counts_E.ctypes.data, len(counts_E)),
        *(up_E.ctypes.data, up_scales_E.ctypes.data, down_E.ctypes.data, down_scales_E.ctypes.data, out_AD.data_ptr()),
        *(width, up[0].padded, inner_width, down[0].padded, up[0].group, num_threads()),
    )
    return out_AD


def _addresses(matrices: Sequence[Packed]) -> tuple[np.ndarray, np.ndarray]:
    numbers = [packed.numbers.data_ptr() for packed in matrices]
    scales = [0 if packed.scales is None else packed.scales.data_ptr() for packed in matrices]
    return np.array(numbers, np.uint64), np.array(scales, np.uint64)
