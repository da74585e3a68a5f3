"""Detects processes of this host that are stopped: by SIGSTOP, a debugger, or a cgroup freezer that shows the same state."""

import time
from collections.abc import Callable, Mapping

CHECK_INTERVAL_S = 0.5
"""The detector reads /proc no more often than this."""


def context_switches_if_stopped(pid: int) -> int | None:
    """A stopped process's number of context switches, which changes if it runs in between; None if it is not stopped.

    From /proc/<pid>/status, see proc(5).
    """
    try:
        with open(f"/proc/{pid}/status") as status:
            fields = dict(line.split(":", 1) for line in status if ":" in line)
    except OSError:
        return None
    if fields["State"].split()[0] not in ("T", "t"):
        return None
    return int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger keeps the process from running."""
    return context_switches_if_stopped(pid) is not None


class FrozenProcessDetector:
    """Finds a process that has been stopped for too long without interruption. Short stops do not count, however many there are."""

    def __init__(
        self,
        pids: Mapping[int, int],
        limit_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        probe: Callable[[int], int | None] = context_switches_if_stopped,
    ) -> None:
        """``pids``: rank to pid."""
        self._pids, self._limit_s, self._clock, self._probe = pids, limit_s, clock, probe
        self._since: dict[int, tuple[int, float]] = {}
        """For each stopped rank: its number of context switches, and since when it has been stopped."""
        self._checked_at = clock()

    def frozen_rank(self) -> int | None:
        """A rank that has been stopped for longer than the limit; None if there is none."""
        now = self._clock()
        if now - self._checked_at >= CHECK_INTERVAL_S:
            if now - self._checked_at > self._limit_s:
                self._since.clear()  # nobody called for a while, so a process may have run in between
            self._checked_at = now
            seen = {rank: self._probe(pid) for rank, pid in self._pids.items()}
            stopped = {rank: at for rank, at in seen.items() if at is not None}
            self._since = {rank: (at, self._stopped_since(rank, at, now)) for rank, at in stopped.items()}
        return next((rank for rank, (_, since) in self._since.items() if now - since >= self._limit_s), None)

    def _stopped_since(self, rank: int, at: int, now: float) -> float:
        before, since = self._since.get(rank, (at, now))
        return since if before == at else now
