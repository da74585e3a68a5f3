"""The highest logits of a row, exactly, at little more than half of what all of them cost.

T rows, K input features, N outputs in panels. A row that is decided by its few highest outputs (the highest, or the first of a top-k)
does not need the others exactly. So all rows meet the matrix as it would be held with int8: half the bytes to read and half the
operations. How far such an output is from the exact one is bounded (Cauchy and Schwarz): by ``|x - x'| |w'| + |x| |w - w'|``, where x'
and w' are what rounding makes of a row and of an output's weights. A panel whose highest output lies lower than the top_logits ones by more
than that cannot hold one of them. Those that can, few of some thousands, are multiplied as they are, by the kernel that multiplies all of
them otherwise: to the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.native.library import Native, num_threads
from parallel.native.linear import Packed, empty_packed

_FEW_ROWS = 2
"""Up to so many are multiplied in twice 8 bits, which takes hardly longer as the matrix is read once: fewer panels are then in doubt."""
_MANY_ROWS = 32
"""So many are multiplied no faster than the matrix is read."""


@dataclass(frozen=True)
class TopLogits:
    """What decides each of the rows (T)."""

    highest: Sequence[int]
    """So many of the highest outputs, what ties with the last of them among them."""
    lowered: Sequence[np.ndarray]
    """int64, of each row: outputs that will be lowered before its highest are looked for."""
    limit: int
    """Outputs from here on are not looked at."""


@dataclass(frozen=True)
class Screen:
    """A matrix of ``bf16_dot``, and what is known of it in 8 bits."""

    exact: Packed
    rough: Packed
    """``int8_dot``"""
    lengths: Tensor
    """(2, panels) float32: of a panel the longest output as it is rounded, and the most that rounding takes from one."""

    def multiply(self, library: Native, x_TK: Tensor, top_logits: TopLogits) -> Tensor | None:
        """(T, N) in float32: of each row the top_logits outputs as `parallel.native.linear.multiply` gives them, to the bit, and all
        others lower than these. None where that would cost as much as all of them exactly."""
        x_TK = x_TK.float().contiguous()
        num_rows, num_inputs = x_TK.shape
        assert library.screened is not None
        assert self.rough.scales is not None
        highest = np.array(top_logits.highest, np.int32)
        lowered = np.concatenate(top_logits.lowered) if top_logits.lowered else np.empty(0, np.int64)
        ends = np.cumsum([len(ids) for ids in top_logits.lowered], dtype=np.int64)
        assert len(highest) == len(ends) == num_rows
        rough_rows = 2 * num_rows if num_rows <= _FEW_ROWS else num_rows
        y_XN = torch.empty(rough_rows, self.exact.num_outputs)
        num_panels = self.lengths.shape[1]
        found: int = library.screened(
            x_TK.data_ptr(),
            self.rough.numbers.data_ptr(),
            self.rough.scales.data_ptr(),
            self.exact.numbers.data_ptr(),
            self.lengths.data_ptr(),
            *(highest.ctypes.data, lowered.ctypes.data, ends.ctypes.data, y_XN.data_ptr()),
            *(num_rows, rough_rows, num_inputs, self.exact.padded, self.rough.padded, self.exact.num_outputs, max(top_logits.limit, 0)),
            *(*_worth_it(num_panels, num_rows), num_threads()),
        )
        return None if found < 0 else y_XN[:num_rows]


def _worth_it(num_panels: int, num_rows: int) -> tuple[int, int]:
    """How many panels of single rows may be multiplied twice, and how many different ones: beyond, it costs as much as is saved. (Measured;
    what is saved grows with the rows.)"""
    panels_of_rows = num_panels * max(num_rows, _MANY_ROWS // 8) // 16
    return panels_of_rows, min(num_panels * max(num_rows, _MANY_ROWS // 3) // _MANY_ROWS, 3 * num_panels // 4)


def screen_of(library: Native, exact: Packed) -> Screen | None:
    """None where there are no kernels for that, or the matrix is held in another form."""
    if library.screen_of is None or exact.kind != "bf16_dot" or exact.lanes != library.lanes or exact.num_outputs == 0:
        return None
    rough = empty_packed("int8_dot", exact.num_outputs, exact.padded, exact.lanes)
    assert rough.scales is not None
    lengths = torch.empty(2, len(exact.numbers))
    library.screen_of(
        exact.numbers.data_ptr(),
        rough.numbers.data_ptr(),
        rough.scales.data_ptr(),
        lengths.data_ptr(),
        *(exact.padded, rough.padded, exact.num_outputs, num_threads()),
    )
    return Screen(exact, rough, lengths)
