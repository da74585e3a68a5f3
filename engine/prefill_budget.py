"""How many prompt tokens go beside sequences that decode, so that their next tokens do not come late.

A step takes as long for those that decode as for the prompts beside them. What steps cost is measured (`engine.step_cost`), so the
tokens that fit into a part of a step, or into a step of a given time, are known; a prompt is then cut into as many parts as that makes.
Where nobody decodes prompts are computed at the full rate.
"""

from collections.abc import Callable

from engine.config import EngineConfig
from engine.plan import StepPlan

StepLine = Callable[[], tuple[float, float]]
LEAST_TOKENS = 16
"""So many prompt tokens go along whatever the step then takes: nobody waits for ever."""
FIRST_TOKENS = 128
"""So many, while steps of one size have been seen only and a step's time is limited."""
MOST_SHARE = 0.9
"""However much waits and however short steps are: prompts then go at nine tenths of the full rate, and streams have a token in ten times
their usual time."""
GROWN_SHARE = 2 / 3
"""However long a step then takes: streams have a token in three times their usual time."""
RECOVERY = 1.1
"""Steps that stay below the limit are trusted with so much more each time, up to what the line says."""


class PrefillBudget:
    """Keeps steps with decoding sequences near what they take without prompts, by `EngineConfig.prompt_share`, `prompt_wait_steps`,
    `prompt_step_s` and `max_step_s`.

    The line through past steps is only a guide (attention over a long context costs more than it says): a step that took longer than
    `max_step_s` makes the next one smaller at once.
    """

    def __init__(self, config: EngineConfig, step_line: StepLine) -> None:
        self._config, self._max_step_s, self._most = config, config.max_step_s, config.max_step_tokens
        self._step_line = step_line
        self._trust = 1.0
        """What part of the line's tokens is planned where a step's time is limited."""

    def prompt_tokens(self, num_decoding: int, num_waiting: int) -> int:
        """Beside so many sequences with a token each, of which there is at least one, of so many prompt tokens that wait."""
        return max(LEAST_TOKENS, min(self._shared(num_decoding, num_waiting), self._within_limit(num_decoding)))

    def note(self, plan: StepPlan, elapsed_s: float) -> None:
        """A step took so long."""
        if self._max_step_s is None:
            return
        num_decoding = len(plan.decodes) + sum(len(work.tokens) - work.num_draft == 1 for work in plan.other_works)
        if not num_decoding or plan.num_tokens == num_decoding:
            return  # nobody waited for prompts
        if elapsed_s > self._max_step_s:
            self._trust = max(0.01, self._trust * self._max_step_s / elapsed_s)
        else:
            self._trust = min(1.0, self._trust * RECOVERY)

    def _shared(self, num_decoding: int, num_waiting: int) -> int:
        """As many as take their share of a step: so large that what waits is done after the time of `prompt_wait_steps` without prompts,
        as far as a step may take."""
        base_s, token_s = self._step_line()
        if self._config.prompt_share >= 1 or token_s <= 0:
            return self._most
        others = base_s / token_s + num_decoding  # tokens that take as long
        wanted = num_waiting / (self._config.prompt_wait_steps * others)
        in_time = 1 - others * token_s / self._config.prompt_step_s
        share = max(self._config.prompt_share, min(wanted, MOST_SHARE, max(in_time, GROWN_SHARE)))
        return int(others * share / (1 - share))

    def _within_limit(self, num_decoding: int) -> int:
        if self._max_step_s is None:
            return self._most
        base_s, token_s = self._step_line()
        if token_s <= 0:
            return FIRST_TOKENS
        return int(((self._max_step_s - base_s) / token_s - num_decoding) * self._trust)
