"""Decides when routed experts are moved between ranks: periodically, and on request. The ranks work out where to."""

import logging
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.counted import counted
from engine.plan import Rebalance, RebalanceResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Requested:
    rebalance: Rebalance
    result: "Future[RebalanceResult]" = field(default_factory=Future)


class ExpertBalancer:
    """`request` may be called from any thread, everything else from the engine's only."""

    def __init__(self, config: EngineConfig) -> None:
        self._every_steps, self._threshold = config.rebalance_every_steps, config.rebalance_threshold
        self._next_step = self._every_steps or 0
        self._requested: deque[_Requested] = deque()
        self.num_moved = 0
        self.imbalance = 1.0

    def request(self, threshold: float) -> "Future[RebalanceResult]":
        requested = _Requested(Rebalance(threshold))
        self._requested.append(requested)
        return requested.result

    @property
    def has_requests(self) -> bool:
        return bool(self._requested)

    def next_rebalance(self, num_steps: int) -> Rebalance | None:
        """The rebalance that is due after ``num_steps`` steps, if any. No further step is planned until it is done."""
        if self._requested:
            return self._requested[0].rebalance
        if self._every_steps is not None and num_steps >= self._next_step:
            return Rebalance(self._threshold)
        return None

    def finish(self, rebalance: Rebalance, result: RebalanceResult | None, num_steps: int) -> None:
        """Record the ranks' result; None from ranks that know nothing of experts."""
        result = result or RebalanceResult()
        self.imbalance = result.imbalance_after
        self.num_moved += result.num_moved
        if not result.loads:
            self._every_steps = None  # a dense model, or every rank has all experts: there is never anything to move
        if self._every_steps is not None:
            self._next_step = num_steps + self._every_steps
        if result.num_moved:
            logger.info(
                "%s moved: imbalance %.2f -> %.2f", counted(result.num_moved, "expert"), result.imbalance_before, result.imbalance_after
            )
        if self._requested and self._requested[0].rebalance is rebalance:
            waiting = self._requested.popleft().result
            if waiting.set_running_or_notify_cancel():  # False: whoever asked for it has cancelled it
                waiting.set_result(result)

    def fail_all(self, error: Exception) -> None:
        """Fail all requests: the workers are lost, or the engine ends."""
        while self._requested:
            waiting = self._requested.popleft().result
            if waiting.set_running_or_notify_cancel():
                waiting.set_exception(error)
