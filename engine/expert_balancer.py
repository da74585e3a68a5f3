"""When routed experts change places: every so many steps, and when somebody asks. Where to is worked out by the ranks."""

import logging
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.plan import Rebalance, RebalanceResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _RebalanceRequest:
    rebalance: Rebalance
    result: "Future[RebalanceResult]" = field(default_factory=Future)


class ExpertBalancer:
    """`ask` belongs to any thread, all else to the engine's."""

    def __init__(self, config: EngineConfig) -> None:
        self._every_steps, self._threshold = config.rebalance_every_steps, config.rebalance_threshold
        self._next_step = self._every_steps or 0
        self._requests: deque[_RebalanceRequest] = deque()
        self.num_moved = 0
        self.imbalance = 1.0

    def request(self, threshold: float) -> "Future[RebalanceResult]":
        request = _RebalanceRequest(Rebalance(threshold))
        self._requests.append(request)
        return request.result

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def next_rebalance(self, num_steps: int) -> Rebalance | None:
        """What the ranks are to do before another step is planned, ``num_steps`` having been taken."""
        if self._requests:
            return self._requests[0].rebalance
        if self._every_steps is not None and num_steps >= self._next_step:
            return Rebalance(self._threshold)
        return None

    def finish(self, rebalance: Rebalance, found: RebalanceResult | None, num_steps: int) -> None:
        """None: these ranks know nothing of experts."""
        found = found or RebalanceResult()
        self.imbalance = found.imbalance_after
        self.num_moved += found.num_moved
        if not found.loads:
            self._every_steps = None  # a dense model, or all experts everywhere: there will never be anything to do
        if self._every_steps is not None:
            self._next_step = num_steps + self._every_steps
        if found.num_moved:
            logger.info("%d experts moved: imbalance %.2f -> %.2f", found.num_moved, found.imbalance_before, found.imbalance_after)
        if self._requests and self._requests[0].rebalance is rebalance:
            self._requests.popleft().result.set_result(found)

    def fail_all(self, error: Exception) -> None:
        """The ranks are lost, or the engine ends."""
        while self._requests:
            self._requests.popleft().result.set_exception(error)
