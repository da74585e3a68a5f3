"""How many prompt tokens go beside sequences that decode, so that their next tokens do not come late.

A step takes as long for those that decode as for the prompts beside them. What steps cost is measured (`engine.step_cost`), so the
tokens that fit into a step of a given time are known; a prompt is then cut into as many parts as that makes. Where nobody decodes
prompts are computed at the full rate.
"""

from collections.abc import Callable

from engine.plan import StepPlan

StepLine = Callable[[], tuple[float, float]]
LEAST_TOKENS = 16
"""So many prompt tokens go along whatever the step then takes: nobody waits for ever."""
FIRST_TOKENS = 128
"""So many, while steps of one size have been seen only."""
RECOVERY = 1.1
"""Steps that stay below the limit are trusted with so much more each time, up to what the line says."""


class Pace:
    """Keeps steps with decoding sequences near ``max_step_s``.

    The line through past steps is only a guide (attention over a long context costs more than it says): a step that took too long
    makes the next one smaller at once.
    """

    def __init__(self, max_step_s: float, step_line: StepLine) -> None:
        if not max_step_s > 0:
            raise ValueError(f"max_step_s must be above 0, got {max_step_s}")
        self._max_step_s, self._step_line = max_step_s, step_line
        self._trust = 1.0
        """What part of the line's tokens is planned."""

    def prompt_tokens(self, num_decoding: int) -> int:
        """Beside so many sequences with a token each, of which there is at least one."""
        base_s, token_s = self._step_line()
        if token_s <= 0:
            return FIRST_TOKENS
        fitting = (self._max_step_s - base_s) / token_s - num_decoding
        return max(LEAST_TOKENS, int(fitting * self._trust))

    def note(self, plan: StepPlan, elapsed_s: float) -> None:
        """A step took so long."""
        num_decoding = len(plan.decodes) + sum(len(work.tokens) - work.num_draft == 1 for work in plan.singly)
        if not num_decoding or plan.num_tokens == num_decoding:
            return  # nobody waited for prompts
        if elapsed_s > self._max_step_s:
            self._trust = max(0.01, self._trust * self._max_step_s / elapsed_s)
        else:
            self._trust = min(1.0, self._trust * RECOVERY)
