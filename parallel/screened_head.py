"""A head that computes the logits which decide, where a step's rows look at few of them: `parallel.native.screened` says how."""

from torch import Tensor

from parallel.native.library import native
from parallel.native.screened import Screen, TopLogits, screen_of
from parallel.packed_format import PackedFormat
from parallel.weight_format import WeightFormat

MAX_PAUSE = 64
"""Steps, after many in which it did not pay."""


class ScreenedHead:
    """Beside a head whose matrix is held in bfloat16. What it gives is exact; where it does not pay, it stops trying for a while."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._pause = self._left = 0

    def is_active(self) -> bool:
        """Asked once for each step: whether it has a use for what is top_logits."""
        if self._left:
            self._left -= 1
            return False
        return True

    def multiply(self, x_RD: Tensor, top_logits: TopLogits) -> Tensor | None:
        """(R, V): of each row the top_logits logits, and all others lower. None: multiply by all of the matrix."""
        library = native()
        if library is None or len(x_RD) == 0:
            return None
        logits_RV = self._screen.multiply(library, x_RD, _known(top_logits, self._screen.exact.num_outputs))
        self._pause = 0 if logits_RV is not None else min(max(2 * self._pause, 1), MAX_PAUSE)
        self._left = self._pause
        return logits_RV


def _known(top_logits: TopLogits, num_ids: int) -> TopLogits:
    """Of a model that guesses for one with a larger vocabulary: without ids that it does not have."""
    return TopLogits(top_logits.highest, [ids[ids < num_ids] for ids in top_logits.lowered], min(top_logits.limit, num_ids))


def screened_head(format: WeightFormat, tensors: dict[str, Tensor]) -> ScreenedHead | None:
    """None where the matrix is not held so, or no kernel does it here."""
    library = native()
    if library is None or not isinstance(format, PackedFormat):
        return None
    screen = screen_of(library, format.packed(tensors))
    return None if screen is None else ScreenedHead(screen)
