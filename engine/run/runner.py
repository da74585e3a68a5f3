"""Step 9 of a request: one rank turns a StepPlan into a forward batch, and the sampling rank its logits into tokens."""

from engine.executor import Capacity
from engine.plan import StepPlan, StepResult


class Runner:
    """One rank of a replica, ready to take steps."""

    capacity: Capacity
    is_sampling: bool
    """Whether this rank's `run` returns the results: exactly one rank of a replica."""

    def run(self, plan: StepPlan) -> StepResult | None:
        """Take one step together with all other ranks. The result on the sampling rank, None elsewhere."""
        raise NotImplementedError
