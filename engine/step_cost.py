"""What a step costs, learnt from those that were taken: seconds = base_s + token_s x tokens."""


class StepCost:
    """A line through the last steps, by least squares; older steps count less and less. Neither part is ever negative."""

    def __init__(self, *, memory_steps: float = 200.0) -> None:
        self._keep = 1.0 - 1.0 / memory_steps
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step took so long."""
        keep = self._keep
        self._n = self._n * keep + 1.0
        self._x = self._x * keep + num_tokens
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + num_tokens * num_tokens
        self._xy = self._xy * keep + num_tokens * seconds

    @property
    def line(self) -> tuple[float, float]:
        """``(base_s, token_s)``; both 0 before the first step, no slope while all steps were of one size."""
        if not self._n:
            return 0.0, 0.0
        spread = self._n * self._xx - self._x * self._x
        if spread <= 1e-9 * self._n * self._xx:
            return self._y / self._n, 0.0
        token_s = (self._n * self._xy - self._x * self._y) / spread
        base_s = (self._y - token_s * self._x) / self._n
        if token_s < 0:
            return self._y / self._n, 0.0
        if base_s < 0:
            return 0.0, self._xy / self._xx
        return base_s, token_s
