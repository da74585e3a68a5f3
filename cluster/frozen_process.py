"""Whether a process of this host stands still: SIGSTOP, a debugger, a cgroup's freezer that shows as one."""

import time
from collections.abc import Callable, Mapping

LOOK_S = 0.5
"""Looks in between cost nothing."""


def stopped_at(pid: int) -> int | None:
    """How often the process was put aside until it was stopped, which changes if it runs again; None if it is not stopped.

    From /proc/<pid>/status, see proc(5).
    """
    try:
        with open(f"/proc/{pid}/status") as status:
            told = dict(line.split(":", 1) for line in status if ":" in line)
    except OSError:
        return None
    if told["State"].split()[0] not in ("T", "t"):
        return None
    return int(told["voluntary_ctxt_switches"]) + int(told["nonvoluntary_ctxt_switches"])


def is_stopped(pid: int) -> bool:
    """Whether a signal, or a debugger, keeps the process from running."""
    return stopped_at(pid) is not None


class FrozenProcessDetector:
    """Tells which of some processes has been stopped for too long without a break. A short stop is nobody's loss, nor are many."""

    def __init__(
        self,
        pids: Mapping[int, int],
        limit_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        look: Callable[[int], int | None] = stopped_at,
    ) -> None:
        """``pids``: by rank."""
        self._pids, self._limit_s, self._clock, self._look = pids, limit_s, clock, look
        self._since: dict[int, tuple[int, float]] = {}
        """Of ranks that are stopped: where, and since when."""
        self._looked = clock()

    def frozen(self) -> int | None:
        """The rank that is; None if none is."""
        now = self._clock()
        if now - self._looked >= LOOK_S:
            if now - self._looked > self._limit_s:
                self._since.clear()  # nobody looked: what was seen before says nothing about the time in between
            self._looked = now
            seen = {rank: self._look(pid) for rank, pid in self._pids.items()}
            stopped = {rank: at for rank, at in seen.items() if at is not None}
            self._since = {rank: (at, self._stands_since(rank, at, now)) for rank, at in stopped.items()}
        return next((rank for rank, (_, since) in self._since.items() if now - since >= self._limit_s), None)

    def _stands_since(self, rank: int, at: int, now: float) -> float:
        before, since = self._since.get(rank, (at, now))
        return since if before == at else now
