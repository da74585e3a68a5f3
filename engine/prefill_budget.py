"""How many prompt tokens go into a step alongside sequences that decode, so that their next tokens do not come late.

A decoding sequence waits for the whole step, prompts included. The cost of steps is measured (`engine.step_cost`), so the number of prompt
tokens that fit into a part of a step, or into a step of a given time, is known; prompts are cut accordingly (chunked prefill). When nothing
decodes, prompts are computed at full rate.
"""

from collections.abc import Callable

from engine.config import EngineConfig
from engine.plan import StepPlan

StepLine = Callable[[], tuple[float, float]]
"""Returns ``(base_s, token_s)``: the measured cost of a step and of each token in it, in seconds (`engine.step_cost`)."""
MIN_TOKENS = 16
"""Prompt tokens per step at least, however long the step takes: every prompt makes progress."""
FIRST_TOKENS = 128
"""Prompt tokens per step while only steps of one size have been measured and the time of a step is limited."""
MAX_SHARE = 0.9
"""However many prompts wait and however short steps are: prompts then go at nine tenths of the full rate, and streams get a token in ten
times their usual time."""
MAX_SHARE_LONG_STEPS = 2 / 3
"""However many prompts wait, where steps are long: streams get a token in three times their usual time."""
RECOVERY = 1.1
"""After each step below the time limit the next may take so much more, up to the estimate."""


class PrefillBudget:
    """Keeps steps with decoding sequences near what they take without prompts, by `EngineConfig.prompt_share`, `prompt_wait_steps`,
    `prompt_step_s` and `max_step_s`.

    The estimate by step cost is only a guide, because attention over a long context costs more than it says: a step that took longer than
    `max_step_s` makes the next one smaller at once.
    """

    def __init__(self, config: EngineConfig, step_line: StepLine) -> None:
        self._config, self._max_step_s, self._max_tokens = config, config.max_step_s, config.max_step_tokens
        self._step_line = step_line
        self._scale = 1.0
        """What part of the estimated tokens is planned where the time of a step is limited."""

    def tokens(self, num_decoding: int, num_waiting: int) -> int:
        """Prompt tokens alongside ``num_decoding`` (at least one) sequences that decode, out of ``num_waiting`` prompt tokens."""
        return max(MIN_TOKENS, min(self._by_share(num_decoding, num_waiting), self._by_time(num_decoding)))

    def note(self, plan: StepPlan, elapsed_s: float) -> None:
        """Record the time of a step."""
        if self._max_step_s is None:
            return
        num_decoding = len(plan.decodes) + sum(len(work.tokens) - work.num_draft == 1 for work in plan.other_works)
        if not num_decoding or plan.num_tokens == num_decoding:
            return  # no decoding sequence waited for prompts
        if elapsed_s > self._max_step_s:
            self._scale = max(0.01, self._scale * self._max_step_s / elapsed_s)
        else:
            self._scale = min(1.0, self._scale * RECOVERY)

    def _by_share(self, num_decoding: int, num_waiting: int) -> int:
        """As many tokens as give prompts their share of the step.

        The share is large enough for all waiting prompts to be done in the time of `prompt_wait_steps` steps without prompts, within the
        limits for a step.
        """
        base_s, token_s = self._step_line()
        if self._config.prompt_share >= 1 or token_s <= 0:
            return self._max_tokens
        others = base_s / token_s + num_decoding  # everything but the prompts, in tokens that take as long
        wanted = num_waiting / (self._config.prompt_wait_steps * others)
        in_time = 1 - others * token_s / self._config.prompt_step_s
        share = max(self._config.prompt_share, min(wanted, MAX_SHARE, max(in_time, MAX_SHARE_LONG_STEPS)))
        return int(others * share / (1 - share))

    def _by_time(self, num_decoding: int) -> int:
        """As many tokens as keep the step within `max_step_s`."""
        if self._max_step_s is None:
            return self._max_tokens
        base_s, token_s = self._step_line()
        if token_s <= 0:
            return FIRST_TOKENS
        return int(((self._max_step_s - base_s) / token_s - num_decoding) * self._scale)
