"""The interface between the engine and the ranks: an executor takes a StepPlan and answers with a StepResult."""

from dataclasses import dataclass
from typing import Protocol

from engine.plan import StepPlan, StepResult


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What the ranks can hold, as they measured it. A result, never written into a config."""

    num_blocks: int
    """KV blocks of every rank, and so of every shard: the minimum over all ranks."""
    block_tokens: int
    max_context_tokens: int
    """Limit for prompt and output of a sequence: the model's, or what all blocks hold if less."""
    num_shards: int = 1
    """Data-parallel positions, each with its own KV cache. A sequence lives in one of them."""
    num_stages: int = 1
    """Pipeline stages: as many steps can be computed at the same time."""
    runs_ahead: bool = False
    """Whether the ranks keep what they sampled last, so that the next step may be planned before they have answered. Its `Decodes` then
    have `NO_TOKEN` for the tokens not known yet."""

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks the KV of ``num_tokens`` tokens takes."""
        return -(-num_tokens // self.block_tokens)


class PendingStep(Protocol):
    """A step in flight."""

    def result(self) -> StepResult:
        """Wait for the step.

        Raises:
            WorkersLost: a rank died, raised, or the step's deadline passed.
        """
        ...


class Executor(Protocol):
    """Computes steps in the order in which they are submitted. Implementations: in this process, child processes, and Ray workers."""

    @property
    def capacity(self) -> Capacity:
        """What all ranks can hold and do; it does not change."""
        ...

    def submit(self, plan: StepPlan) -> PendingStep:
        """Hand a plan to all ranks. Its result is waited for by `PendingStep.result`."""
        ...

    def close(self) -> None:
        """End the ranks and free their resources. Idempotent."""
        ...
