"""Requests that wait at a front because no replica is ready, and what a front tells of its demand to the autoscaler."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.autoscaling import TTFT_WINDOW_S
from cluster.errors import NoReplicaReady
from engine.request import Request

MAX_TIMES = 512
MAX_HELD = 4096


class AdmissionQueue:
    """Bounded in number and time. One for each model and front."""

    def __init__(
        self, *, wait_s: float, max_held: int = MAX_HELD, can_scale_from_zero: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``can_scale_from_zero``: a replica is started for whoever waits, so that waiting makes sense although there is none."""
        self.wait_s, self.can_scale_from_zero = wait_s, can_scale_from_zero
        self._max_held, self._clock = max_held, clock
        self._held: Counter[tuple[str, int]] = Counter()
        self._held_tokens = 0
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=MAX_TIMES)
        self._last_wait_s = 1.0
        self._num_asked = 0

    @property
    def num_held(self) -> int:
        return self._held.total()

    @contextmanager
    def hold(self, request: Request) -> Iterator[None]:
        """For as long as the request waits.

        Raises:
            NoReplicaReady: as many wait as may; how long those before waited is when to try again.
        """
        if self.num_held >= self._max_held:
            raise NoReplicaReady(waited_s=0.0, retry_after_s=max(1.0, round(self._last_wait_s)))
        begun, tokens = self._clock(), len(request.prompt) + len(request.committed)
        self._held[request.key] += 1
        self._held_tokens += tokens
        try:
            yield
        finally:
            self._held -= Counter({request.key: 1})
            self._held_tokens -= tokens
            self._last_wait_s = self._clock() - begun

    def count_request(self) -> None:
        """A request came, whether it must wait or not."""
        self._num_asked += 1

    def record_ttft(self, seconds: float) -> None:
        """So long after its choice of a replica a request had its first token."""
        self._first_tokens.append((self._clock(), seconds))

    def demand(self) -> dict[str, Any]:
        """For the directory, in plain values."""
        recent = sorted(seconds for when, seconds in self._first_tokens if when > self._clock() - TTFT_WINDOW_S)
        ttft_s = recent[int(0.9 * (len(recent) - 1))] if recent else None
        return {"num_held": self.num_held, "held_tokens": self._held_tokens, "num_asked": self._num_asked, "ttft_s": ttft_s}
