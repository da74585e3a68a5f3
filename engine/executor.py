"""The seam between deciding and computing: who takes a StepPlan and answers with a StepResult."""

from dataclasses import dataclass
from typing import Protocol

from engine.plan import StepPlan, StepResult


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the ranks measured that they can hold. A result, never written into a config."""

    num_blocks: int
    """KV blocks of every rank (the least of all ranks)."""
    block_tokens: int
    max_context_tokens: int
    """Prompt and output of one sequence together: the model's limit, or what all blocks hold if that is less."""


class PendingStep(Protocol):
    """A step that is under way."""

    def result(self) -> StepResult:
        """Wait for the step.

        Raises:
            WorkersLost: a rank died, raised, or the step's deadline passed.
        """
        ...


class Executor(Protocol):
    """Takes steps in the order they are submitted. Two implementations: in this process, and Ray workers."""

    @property
    def capacity(self) -> Capacity: ...

    def submit(self, plan: StepPlan) -> PendingStep: ...

    def close(self) -> None:
        """End the ranks and free what they hold. Idempotent."""
        ...
