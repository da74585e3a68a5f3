"""Computes the top logits of a row exactly, at little more than half the cost of computing all logits.

T rows, K input features, N outputs in panels. If only a row's highest outputs matter (greedy, or a small top-k), the others need not be
exact. So rows are first multiplied by an int8 copy of the matrix: half the bytes to read and half the operations. The error of such an
output is bounded (Cauchy-Schwarz) by ``|x - x'| |w'| + |x| |w - w'|``, where x' and w' are the quantised row and weights. A panel whose
highest approximate output is lower than the needed ones by more than this bound cannot contain any of them. The remaining panels, a few of
some thousands, are then multiplied exactly by the same kernel that would multiply all of them, so results are bit-identical.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.native.library import Native, num_threads
from parallel.native.linear import Packed, empty_packed

_FEW_ROWS = 2
"""Up to so many rows are multiplied in two terms of 8 bits, which takes hardly longer, as the matrix is read once, and leaves fewer panels
to be computed exactly."""
_MANY_ROWS = 32
"""With so many rows, a product is no longer bound by reading the matrix."""


@dataclass(frozen=True)
class TopLogits:
    """Which logits of each row (T) must be exact."""

    highest: Sequence[int]
    """How many of the highest outputs each row needs, including ties with the last of them."""
    lowered: Sequence[np.ndarray]
    """int64, for each row: outputs that will be lowered (penalties, masks) before its highest are selected."""
    limit: int
    """Outputs from this index on are ignored."""


@dataclass(frozen=True)
class Screen:
    """A ``bf16_dot`` matrix with its 8-bit copy and error bounds."""

    exact: Packed
    rough: Packed
    """``int8_dot``"""
    norms: Tensor
    """(2, panels) float32: the largest norm of a panel's quantised outputs, and the largest norm of their quantisation errors."""

    def multiply(self, library: Native, x_TK: Tensor, top_logits: TopLogits) -> Tensor | None:
        """(T, N) in float32: each row's needed outputs, bit-identical to `parallel.native.linear.multiply`, and all others lower. None if
        that would cost as much as the exact product."""
        x_TK = x_TK.float().contiguous()
        num_rows, num_inputs = x_TK.shape
        assert library.screened is not None
        assert self.rough.scales is not None
        highest = np.array(top_logits.highest, np.int32)
        lowered = np.concatenate(top_logits.lowered) if top_logits.lowered else np.empty(0, np.int64)
        ends = np.cumsum([len(ids) for ids in top_logits.lowered], dtype=np.int64)
        assert len(highest) == len(ends) == num_rows
        rough_rows = 2 * num_rows if num_rows <= _FEW_ROWS else num_rows
        y_TN = torch.empty(num_rows, self.exact.num_outputs)
        num_panels = self.norms.shape[1]
        found: int = library.screened(
            x_TK.data_ptr(),
            self.rough.numbers.data_ptr(),
            self.rough.scales.data_ptr(),
            self.exact.numbers.data_ptr(),
            self.norms.data_ptr(),
            *(highest.ctypes.data, lowered.ctypes.data, ends.ctypes.data, y_TN.data_ptr()),
            *(num_rows, rough_rows, num_inputs, self.exact.padded, self.rough.padded, self.exact.num_outputs, max(top_logits.limit, 0)),
            *(*_worth_it(num_panels, num_rows), num_threads()),
        )
        return None if found < 0 else y_TN


def _worth_it(num_panels: int, num_rows: int) -> tuple[int, int]:
    """How many (row, panel) pairs, and how many distinct panels, may be computed exactly before it costs more than it saves. (Measured; the
    saving grows with the rows.)"""
    max_pairs = num_panels * max(num_rows, _MANY_ROWS // 8) // 16
    return max_pairs, min(num_panels * max(num_rows, _MANY_ROWS // 3) // _MANY_ROWS, 3 * num_panels // 4)


def screen_of(library: Native, exact: Packed) -> Screen | None:
    """None if there are no kernels for it, or the matrix is held in another format."""
    if library.screen_of is None or exact.kind != "bf16_dot" or exact.lanes != library.lanes or exact.num_outputs == 0:
        return None
    rough = empty_packed("int8_dot", exact.num_outputs, exact.padded, exact.lanes)
    assert rough.scales is not None
    norms = torch.empty(2, len(exact.numbers))
    library.screen_of(
        exact.numbers.data_ptr(),
        rough.numbers.data_ptr(),
        rough.scales.data_ptr(),
        norms.data_ptr(),
        *(exact.padded, rough.padded, exact.num_outputs, num_threads()),
    )
    return Screen(exact, rough, norms)
