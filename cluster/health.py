"""A replica's health: whether it can make tokens, and if not, why. Uses neither Ray nor sockets, only a clock."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from cluster.config import SLOW_STEP_FACTOR
from engine.load_stats import LoadStats

PHASE_SPANS = {"groups": (0.0, 0.05), "weights": (0.05, 0.9), "memory": (0.9, 0.92), "warm_up": (0.92, 0.94), "capture": (0.94, 1.0)}
"""Phase of `engine.run.start` -> the part of a progress bar from 0 to 1 that it fills."""


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Progress of a start: that of the slowest rank."""

    doing: str = "starting worker processes"
    done: float = 0.0


class StartProgressTracker:
    """Keeps the last progress report of every rank while it starts."""

    def __init__(self, num_ranks: int) -> None:
        self._done = dict.fromkeys(range(num_ranks), (0.0, "starting worker processes"))
        self._read: dict[int, LoadStats] = {}

    def update(self, rank: int, phase: str, done: int, total: int, read: LoadStats | None = None) -> None:
        if read is not None:
            self._read[rank] = read
        start, stop = PHASE_SPANS.get(phase, (0.0, 0.0))
        fraction = done / total if total else 0.0
        self._done[rank] = (start + (stop - start) * min(fraction, 1.0), phase)

    def read_by(self, rank: int) -> LoadStats | None:
        """What a rank read from the checkpoint, once its weights are loaded."""
        return self._read.get(rank)

    @property
    def loading(self) -> Loading:
        done, doing = min(self._done.values())
        return Loading(doing=doing.replace("_", " "), done=done)


class StepStallDetector:
    """Detects an engine that has work but finishes no steps. The limit grows with the usual duration of a step."""

    def __init__(self, limit_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock = limit_s, clock
        self._num_steps, self._since = -1, clock()

    def reset(self) -> None:
        """The engine is idle: restart the clock."""
        self._since = self._clock()

    def stalled_s(self, num_steps: int, step_s: float) -> float | None:
        """Seconds since the last finished step if that is too long, else None. ``step_s``: how long a step usually takes."""
        now = self._clock()
        if num_steps != self._num_steps:
            self._num_steps, self._since = num_steps, now
        stalled_s = now - self._since
        return stalled_s if stalled_s > max(self._limit_s, SLOW_STEP_FACTOR * step_s) else None


class Health:
    """The state of a replica. Ready means: since the ranks were last started they have made a token, and no loss came after it.

    Every loss starts a new `generation`; a canary that was sent in an earlier one proves nothing. Thread-safe.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._state = State.STARTING
        self._generation = 0
        self._reason = "the ranks are starting"
        self._ranks_lost = False
        self._lost_host: str | None = None
        self._since = clock()
        self._proven_at = clock()

    @property
    def state(self) -> State:
        return self._state

    @property
    def ready(self) -> bool:
        return self._state is State.READY

    @property
    def ranks_lost(self) -> bool:
        """Whether there can be no token before the ranks are restarted."""
        return self._ranks_lost and self._state is State.RECOVERING

    @property
    def lost_host(self) -> str | None:
        """The unreachable host, if that is why the ranks were lost. Ray may need long to find another host."""
        return self._lost_host if self.ranks_lost else None

    @property
    def generation(self) -> int:
        return self._generation

    @property
    def reason(self) -> str:
        return self._reason

    def record_token(self) -> None:
        """A token has just come, so all ranks work."""
        self._proven_at = self._clock()

    @property
    def unproven_s(self) -> float:
        """Seconds since the last proof that all ranks work."""
        return self._clock() - self._proven_at

    def mark_lost(self, reason: str, *, host: str | None = None, announced: bool = True) -> int:
        """The ranks are lost. Returns the new generation.

        ``host``: the host that became unreachable, if that is the reason. ``announced``: whether the engine has already sent the loss
        counts of the requests in the lost step; before that, fronts must not move their streams to other replicas.
        """
        with self._lock:
            if self._state not in (State.FAILED, State.DRAINING):
                self._become(State.RECOVERING, reason)
            self._ranks_lost = self._ranks_lost or announced
            self._lost_host = host or self._lost_host
            self._generation += 1
            return self._generation

    def record_canary(self, generation: int) -> bool:
        """A token requested in ``generation`` has come. Returns False if the ranks were lost after it was requested."""
        with self._lock:
            self._proven_at = self._clock()
            if generation != self._generation or self._state not in (State.STARTING, State.RECOVERING, State.READY):
                return False
            self._ranks_lost, self._lost_host = False, None
            self._become(State.READY, "")
            return True

    def mark_suspect(self, reason: str) -> None:
        """Not ready until the next token, although no loss is known."""
        with self._lock:
            if self._state is State.READY:
                self._become(State.RECOVERING, reason)

    def mark_draining(self) -> None:
        with self._lock:
            if self._state is not State.FAILED:
                self._become(State.DRAINING, "asked to stop")

    def mark_failed(self, reason: str) -> None:
        with self._lock:
            self._become(State.FAILED, reason)

    def _become(self, state: State, reason: str) -> None:
        if state is not self._state:
            self._since = self._clock()
        self._state, self._reason = state, reason

    def __repr__(self) -> str:
        return f"<Health {self._state} for {self._clock() - self._since:.1f} s{': ' + self._reason if self._reason else ''}>"
