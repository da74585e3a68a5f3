"""Estimates what a step costs from the steps measured so far: seconds = base_s + token_s x tokens."""

from collections import defaultdict


class StepCost:
    """A least-squares line through the measured steps. Older steps weigh less and less, but only among steps of about the same size.

    So a thousand decode steps do not make it forget what the last prefill steps took. Neither coefficient is ever negative.
    """

    def __init__(self, *, memory_steps: float = 100.0) -> None:
        """``memory_steps``: over how many steps of one size the weight decays."""
        self._keep = 1.0 - 1.0 / memory_steps
        self._sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * 5)
        """By octave of tokens: n, x, y, xx, xy."""
        self._line: tuple[float, float] | None = None
        """Cached since the last step, because it is read several times."""

    def note(self, num_tokens: int, seconds: float) -> None:
        """Record the time of a step."""
        sums, keep, x = self._sums[num_tokens.bit_length()], self._keep, num_tokens
        self._line = None
        sums[:] = [old * keep + new for old, new in zip(sums, (1.0, x, seconds, x * x, x * seconds), strict=True)]

    @property
    def line(self) -> tuple[float, float]:
        """``(base_s, token_s)``. Both are 0 before the first step; ``token_s`` is 0 while all steps were of one size."""
        if self._line is None:
            self._line = self._fit() if self._sums else (0.0, 0.0)
        return self._line

    def _fit(self) -> tuple[float, float]:
        n, x, y, xx, xy = map(sum, zip(*self._sums.values(), strict=True))
        spread = n * xx - x * x
        if spread <= 1e-9 * n * xx:
            return y / n, 0.0
        token_s = (n * xy - x * y) / spread
        base_s = (y - token_s * x) / n
        if token_s < 0:
            return y / n, 0.0
        if base_s < 0:
            return 0.0, xy / xx
        return base_s, token_s
