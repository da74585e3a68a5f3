"""The seam between deciding and computing: who takes a StepPlan and answers with a StepResult."""

from dataclasses import dataclass
from typing import Protocol

from engine.plan import StepPlan, StepResult


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the ranks measured that they can hold. A result, never written into a config."""

    num_blocks: int
    """KV blocks of every rank (the least of all ranks), and so of every shard."""
    block_tokens: int
    max_context_tokens: int
    """Prompt and output of one sequence together: the model's limit, or what all blocks hold if that is less."""
    num_shards: int = 1
    """Data-parallel positions, each with a cache of its own: a sequence lives in one of them."""
    num_stages: int = 1
    """Pipeline stages: so many steps can be computed at the same time."""
    runs_ahead: bool = False
    """Whether the ranks know themselves what they sampled last, so that the step behind it may be planned before they have answered: its
    `Decodes` have `NO_TOKEN` then."""

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold the KV of so many tokens."""
        return -(-num_tokens // self.block_tokens)


class PendingStep(Protocol):
    """A step that is under way."""

    def result(self) -> StepResult:
        """Wait for the step.

        Raises:
            WorkersLost: a rank died, raised, or the step's deadline passed.
        """
        ...


class Executor(Protocol):
    """Takes steps in the order they are submitted. Implementations: in this process, child processes, and Ray workers."""

    @property
    def capacity(self) -> Capacity: ...

    def submit(self, plan: StepPlan) -> PendingStep: ...

    def close(self) -> None:
        """End the ranks and free what they hold. Idempotent."""
        ...
