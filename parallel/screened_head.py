"""A head that computes the logits which decide, where a step's rows look at few of them: `parallel.native.screened` says how."""

import torch
from torch import Tensor

from parallel.native.library import native
from parallel.native.screened import Screen, Sought, screen_of
from parallel.packed_format import PackedFormat
from parallel.weight_format import WeightFormat

MOST_PAUSE = 64
"""Steps, after many in which it did not pay."""


class ScreenedHead:
    """Beside a head whose matrix is held in bfloat16. What it gives is exact; where it does not pay, it stops trying for a while."""

    def __init__(self, screen: Screen, first: int) -> None:
        """``first``: the id of the matrix's first output."""
        self._screen, self._first = screen, first
        self._pause = self._left = 0

    def multiply(self, x_RD: Tensor, sought: Sought) -> Tensor | None:
        """(R, this rank's share of V): of each row the sought logits, and all others lower. None: multiply by all of the matrix."""
        library = native()
        if library is None or x_RD.dtype != torch.float32 or len(x_RD) == 0:  # in fewer bits others might tie with what is sought
            return None
        if self._left:
            self._left -= 1
            return None
        logits_RV = self._screen.multiply(library, x_RD, self._mine(sought))
        self._pause = 0 if logits_RV is not None else min(max(2 * self._pause, 1), MOST_PAUSE)
        self._left = self._pause
        return logits_RV

    def _mine(self, sought: Sought) -> Sought:
        """Ids as the numbers of this rank's outputs."""
        last = self._first + self._screen.exact.num_outputs
        lowered = [ids[(ids >= self._first) & (ids < last)] - self._first for ids in sought.lowered]
        return Sought(sought.highest, lowered, sought.limit - self._first)


def screened_head(format: WeightFormat, tensors: dict[str, Tensor], first: int) -> ScreenedHead | None:
    """None where the matrix is not held so, or no kernel does it here."""
    library = native()
    if library is None or not isinstance(format, PackedFormat):
        return None
    screen = screen_of(library, format.packed(tensors))
    return None if screen is None else ScreenedHead(screen, first)
