"""Step 8 of a request: a step between its beginning on a rank and its answer, so that the next one is there before this one is read."""

from collections.abc import Callable
from dataclasses import dataclass

from engine.plan import StepResult


@dataclass(eq=False)
class StepHandle:
    """A step that a rank has begun; this one is over."""

    outcome: StepResult | None
    """None on a rank that does not answer."""

    def is_done(self) -> bool:
        """Whether `result` would wait for nothing."""
        return True

    def result(self) -> StepResult | None:
        """What the step gave, when it is over."""
        return self.outcome


NO_RESULT = StepHandle(None)


def message_comes_first(begun: StepHandle, has_message: Callable[[], bool]) -> bool:
    """Wait until a step is done or a message is there. Whether it is the message. The processor is kept busy while a device is at the step:
    a step of a small model is shorter than the least time that a sleep takes."""
    while not begun.is_done():
        if has_message():
            return True
    return False
