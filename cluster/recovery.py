"""Recovery from a loss of ranks: end those that are left, start new ones in the same placement group, give up after too many losses."""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.config import ReplicaConfig
from cluster.errors import RecoveryGivenUp, StartFailed
from engine.errors import WorkersLost
from engine.executor import Executor
from engine.failpoints import hit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PostMortem:
    """What is known about one loss of ranks."""

    unix_time: float
    message: str
    rank: int | None
    host: str | None
    rank_traceback: str | None
    last_collectives: tuple[str, ...] = ()
    """For each rank on the replica's host: which collective it entered last, and when."""

    @classmethod
    def of(cls, loss: WorkersLost, unix_time: float) -> "PostMortem":
        return cls(
            unix_time=unix_time,
            message=str(loss),
            rank=loss.rank,
            host=loss.host,
            rank_traceback=loss.rank_traceback,
            last_collectives=loss.last_collectives,
        )

    def __str__(self) -> str:
        traceback = [self.rank_traceback.rstrip()] if self.rank_traceback else []
        return "\n".join((self.message, *traceback, *self.last_collectives))


class RestartBudget:
    """Allows so many restarts within a window, with exponential backoff from the second one on.

    max_restarts=3, backoff_s=0.5:  wait 0 s, 0.5 s, 1.0 s, then no restart is left
    """

    def __init__(self, *, max_restarts: int, window_s: float, backoff_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max, self._window_s, self._backoff_s, self._clock = max_restarts, window_s, backoff_s, clock
        self._spent: deque[float] = deque()

    def take(self) -> float | None:
        """Take one restart. Returns the seconds to wait before it, or None if no restart is left."""
        now = self._clock()
        while self._spent and now - self._spent[0] > self._window_s:
            self._spent.popleft()
        if len(self._spent) >= self._max:
            return None
        self._spent.append(now)
        earlier = len(self._spent) - 1
        return self._backoff_s * 2 ** (earlier - 1) if earlier else 0.0


class Recovery:
    """Restarts a replica's ranks. The engine's thread calls `restore`, and goes on with the executor that it returns."""

    def __init__(
        self,
        start: Callable[[], Executor],
        config: ReplicaConfig,
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start, self._sleep = start, sleep
        self._budget = RestartBudget(
            max_restarts=config.max_restarts,
            window_s=config.restart_window_s,
            backoff_s=config.restart_backoff_s,
            clock=clock,
        )
        self.post_mortems: deque[PostMortem] = deque(maxlen=16)
        self.num_restarts = 0

    def restore(self, lost: Executor, loss: WorkersLost) -> Executor:
        """End the ranks of ``lost`` and return an executor with new ones, whose KV caches are empty.

        Raises:
            RecoveryGivenUp: ranks were lost, or could not be started, too often within the window.
            EngineStopped: from ``start``, because the replica is shutting down.
        """
        self._record(PostMortem.of(loss, time.time()))
        hit("replica.recover")
        lost.close()
        while (wait_s := self._budget.take()) is not None:
            self._sleep(wait_s)
            try:
                executor = self._start()
            except StartFailed as error:
                self._record(PostMortem(unix_time=time.time(), message=str(error), rank=None, host=None, rank_traceback=None))
                continue
            self.num_restarts += 1
            return executor
        raise RecoveryGivenUp(f"no restart is left; the last loss: {self.post_mortems[-1].message}")

    def _record(self, post_mortem: PostMortem) -> None:
        self.post_mortems.append(post_mortem)
        logger.error("ranks lost: %s", post_mortem)
