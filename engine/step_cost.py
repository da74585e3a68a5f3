"""What a step costs, learnt from those that were taken: seconds = base_s + token_s x tokens."""

from collections import defaultdict


class StepCost:
    """A line through the last steps, by least squares; older steps count less and less, among those of about their size.

    So a thousand steps that only decode do not make it forget what the last prompts took. Neither part is ever negative.
    """

    def __init__(self, *, memory_steps: float = 100.0) -> None:
        """``memory_steps``: of one size."""
        self._keep = 1.0 - 1.0 / memory_steps
        self._sums: defaultdict[int, list[float]] = defaultdict(lambda: [0.0] * 5)
        """By octave of tokens: n, x, y, xx, xy."""
        self._line: tuple[float, float] | None = None
        """Since the last step; it is asked for several times."""

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step took so long."""
        sums, keep, x = self._sums[num_tokens.bit_length()], self._keep, num_tokens
        self._line = None
        sums[:] = [old * keep + new for old, new in zip(sums, (1.0, x, seconds, x * x, x * seconds), strict=True)]

    @property
    def line(self) -> tuple[float, float]:
        """``(base_s, token_s)``; both 0 before the first step, no slope while all steps were of one size."""
        if self._line is None:
            self._line = self._fitted() if self._sums else (0.0, 0.0)
        return self._line

    def _fitted(self) -> tuple[float, float]:
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
