"""Whether a process of this host stands still: SIGSTOP, a debugger, a cgroup's freezer that shows as one."""

import time
from collections.abc import Callable, Mapping

LOOK_S = 0.5
"""Looks in between cost nothing."""


def is_stopped(pid: int) -> bool:
    """Field 3 of /proc/<pid>/stat, see proc(5)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] in ("T", "t")
    except OSError:
        return False


class FrozenWatch:
    """Tells which of some processes has been stopped for too long without a break. A short stop is nobody's loss."""

    def __init__(
        self,
        pids: Mapping[int, int],
        limit_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        look: Callable[[int], bool] = is_stopped,
    ) -> None:
        """``pids``: by rank."""
        self._pids, self._limit_s, self._clock, self._look = pids, limit_s, clock, look
        self._since: dict[int, float] = {}
        self._looked = clock()

    def frozen(self) -> int | None:
        """The rank that is; None if none is."""
        now = self._clock()
        if now - self._looked >= LOOK_S:
            if now - self._looked > self._limit_s:
                self._since.clear()  # nobody looked: what was seen before says nothing about the time in between
            self._looked = now
            stopped = {rank for rank, pid in self._pids.items() if self._look(pid)}
            self._since = {rank: self._since.get(rank, now) for rank in stopped}
        return next((rank for rank, since in self._since.items() if now - since >= self._limit_s), None)
