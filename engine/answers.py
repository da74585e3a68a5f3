"""The results of a step's shards put together, for executors whose ranks answer each for itself."""

from engine.plan import StepResult


class StepAnswers:
    """Parts of results as they come, in any order, until all shards of a step have answered."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._parts: dict[int, list[StepResult]] = {}

    def put(self, part: StepResult) -> None:
        """What one shard's sampling rank answered."""
        self._parts.setdefault(part.step, []).append(part)

    def take(self, step: int) -> StepResult | None:
        """The whole result of a step, once; None while a shard has not answered."""
        if len(self._parts.get(step, ())) < self._num_shards:
            return None
        parts = self._parts.pop(step)
        return StepResult(
            step=step,
            sampled=tuple(sampled for part in parts for sampled in part.sampled),
            elapsed_s=max(part.elapsed_s for part in parts),
            rebalanced=parts[0].rebalanced,  # the same on every rank
        )
