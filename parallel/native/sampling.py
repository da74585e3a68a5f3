"""Draws tokens from logits on a CPU in one call: the ctypes side of csrc/sampling.cpp. R rows, V columns.

The references, which give identical tokens, are `engine.run.sampling.top_k.highest`, `engine.run.sampling.filters.draw_unfiltered` and
`draw_filtered`, and `engine.run.noise.uniform`.
"""

import torch
from torch import Tensor

from parallel.native.library import Native, num_threads

NUM_PARAMS = 8
"""Of a row: seed, choice, position, top-k (off = V) and draw mode (`engine.run.sampling.columns.DRAW_MODE`); then temperature, top-p and
min-p, which are float64 in the bits of an int64."""


def draw(library: Native, logits_RV: Tensor, params_R8: Tensor) -> Tensor:
    """int64 (2, R): the drawn id of each row, and whether its highest logit is finite; the id is arbitrary if not.

    ``logits_RV``: float32, each row contiguous. ``params_R8``: contiguous int64. Every row is decided, however many ids its filters keep.
    """
    num_rows, vocab_size = logits_RV.shape
    assert logits_RV.stride(1) == 1
    assert params_R8.shape == (num_rows, NUM_PARAMS)
    assert params_R8.is_contiguous()
    report_2R = torch.empty(2, num_rows, dtype=torch.int64)
    library.draw(
        *(logits_RV.data_ptr(), logits_RV.stride(0), params_R8.data_ptr(), report_2R.data_ptr(), num_rows, vocab_size, num_threads())
    )
    return report_2R
