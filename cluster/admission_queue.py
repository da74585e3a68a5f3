"""Requests held at a front until a replica is ready, and the front's demand as reported to the autoscaler."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.autoscaling import TTFT_WINDOW_S
from cluster.errors import NoReplicaReady
from engine.request import Request

MAX_TTFT_SAMPLES = 512
MAX_HELD = 4096


class AdmissionQueue:
    """Counts and bounds the held requests of one model at one front. Which one goes on first is up to the router's polling."""

    def __init__(
        self, *, wait_s: float, max_held: int = MAX_HELD, can_scale_from_zero: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``wait_s``: how long a request is held at most. ``can_scale_from_zero``: a replica is started for held requests, so a model
        without replicas still accepts requests."""
        self.wait_s, self.can_scale_from_zero = wait_s, can_scale_from_zero
        self._max_held, self._clock = max_held, clock
        self.num_held = 0
        """Requests that are held now."""
        self._held_tokens = 0
        self._ttft_samples: deque[tuple[float, float]] = deque(maxlen=MAX_TTFT_SAMPLES)
        self._last_wait_s = 1.0
        self._num_requests = 0

    @contextmanager
    def hold(self, request: Request) -> Iterator[None]:
        """Hold a request for the length of the block.

        Raises:
            NoReplicaReady: too many are held already; it asks to retry after as long as the last one waited.
        """
        if self.num_held >= self._max_held:
            raise NoReplicaReady(waited_s=0.0, retry_after_s=max(1.0, round(self._last_wait_s)))
        started, tokens = self._clock(), len(request.prompt) + len(request.committed)
        self.num_held += 1
        self._held_tokens += tokens
        try:
            yield
        finally:
            self.num_held -= 1
            self._held_tokens -= tokens
            self._last_wait_s = self._clock() - started

    def count_request(self) -> None:
        """Count a request that came, whether it is held or not."""
        self._num_requests += 1

    def record_ttft(self, seconds: float) -> None:
        """Record a time to first token, counted from the choice of a replica."""
        self._ttft_samples.append((self._clock(), seconds))

    def demand(self) -> dict[str, Any]:
        """This front's demand, in plain values, for the directory."""
        recent = sorted(seconds for when, seconds in self._ttft_samples if when > self._clock() - TTFT_WINDOW_S)
        ttft_s = recent[int(0.9 * (len(recent) - 1))] if recent else None
        return {"num_held": self.num_held, "held_tokens": self._held_tokens, "num_asked": self._num_requests, "ttft_s": ttft_s}
