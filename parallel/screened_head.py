"""LM head that computes only the top logits exactly, if a step's rows need no others: see `parallel.native.screened`."""

from torch import Tensor

from parallel.native.library import native
from parallel.native.screened import Screen, TopLogits, screen_of
from parallel.packed_format import PackedFormat
from parallel.weight_format import WeightFormat

MAX_PAUSE = 64
"""Longest pause, in steps, after screening did not pay off."""


class ScreenedHead:
    """An 8-bit copy of a head in bfloat16. The results are exact. If screening does not pay off it pauses, with exponential backoff."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._pause = self._left = 0

    def begin_step(self) -> bool:
        """Whether to screen in this step. Counts the steps of a pause: call it once per step."""
        if self._left:
            self._left -= 1
            return False
        return True

    def multiply(self, x_RD: Tensor, top_logits: TopLogits) -> Tensor | None:
        """(R, V): the needed top logits of each row, exact, and all others lower. None: multiply by the whole matrix instead."""
        library = native()
        if library is None or len(x_RD) == 0:
            return None
        logits_RV = self._screen.multiply(library, x_RD, _known(top_logits, self._screen.exact.num_outputs))
        self._pause = 0 if logits_RV is not None else min(max(2 * self._pause, 1), MAX_PAUSE)
        self._left = self._pause
        return logits_RV


def _known(top_logits: TopLogits, num_ids: int) -> TopLogits:
    """Drop ids that this model does not have: a draft model's vocabulary may be smaller than its target's."""
    lowered = [ids[ids < num_ids] if len(ids) else ids for ids in top_logits.lowered]  # indexing takes a microsecond, and most are empty
    return TopLogits(top_logits.highest, lowered, min(top_logits.limit, num_ids))


def screened_head(format: WeightFormat, tensors: dict[str, Tensor]) -> ScreenedHead | None:
    """None if the matrix is held in another format, or there is no kernel for it on this machine."""
    library = native()
    if library is None or not isinstance(format, PackedFormat):
        return None
    screen = screen_of(library, format.packed(tensors))
    return None if screen is None else ScreenedHead(screen)
