"""Place 8 of a request: a step that a rank has begun. The rank can begin the next step before it reads the result of this one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine.plan import StepResult


class StepHandle(Protocol):
    """A step that a rank has begun, and that a device may still compute."""

    def is_done(self) -> bool:
        """Whether `result` would return at once."""
        ...

    def result(self) -> StepResult | None:
        """Wait for the step and return what it yielded; None on a rank that does not sample."""
        ...


@dataclass(eq=False)
class CompletedStep:
    """A `StepHandle` whose result is there."""

    outcome: StepResult | None

    def is_done(self) -> bool:
        return True

    def result(self) -> StepResult | None:
        return self.outcome


NO_RESULT: StepHandle = CompletedStep(None)


def message_comes_first(step: StepHandle, has_message: Callable[[], bool]) -> bool:
    """Wait until the step is done or a message is there. Returns whether it is the message.

    Polls without sleeping: a step of a small model is shorter than the shortest sleep.
    """
    while not step.is_done():
        if has_message():
            return True
    return False
