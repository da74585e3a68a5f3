"""Canaries: a replica's own requests for one token, which prove that its engine and all its ranks work.

Tokens of clients prove the same, and are needed under load, when a canary may find the queue full.
"""

import itertools
import threading
import time
from collections.abc import Callable

from cluster.health import Health
from engine.errors import EngineStopped, InvalidLogits, QueueFull
from engine.failpoints import hit
from engine.output import EngineOutput
from engine.plan import TokenEvent
from engine.request import Request, SamplingParams

PREFIX = "/canary/"
"""Prefix of the canaries' request ids. Ids of clients contain no slash."""


class Canary:
    """Sends canaries and evaluates their answers. At most one is pending in each generation of `Health`."""

    def __init__(self, health: Health, submit: Callable[[Request], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._health, self._submit, self._clock = health, submit, clock
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._pending: tuple[str, int, float] | None = None
        self._ranks_generation = health.generation

    def send(self) -> None:
        """Send a canary, unless one of the current generation is pending."""
        hit("canary.send")
        with self._lock:
            generation = self._health.generation
            if self._pending is not None and self._pending[1] == generation:
                return
            request_id = f"{PREFIX}{next(self._numbers)}"
            self._pending = (request_id, generation, self._clock())
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        try:
            self._submit(Request(id=request_id, prompt=(0,), sampling=sampling, salt=PREFIX, priority=-(2**31)))
        except (EngineStopped, QueueFull):  # there is nothing to prove, or the requests in the queue will prove it
            self._pending = None

    def note_restart(self) -> None:
        """The old ranks have ended and new ones start, so tokens from now on prove that the new ones work."""
        self._ranks_generation = self._health.generation

    @property
    def pending_s(self) -> float:
        """Seconds since the pending canary was sent; 0 if none is pending."""
        pending = self._pending
        return self._clock() - pending[2] if pending else 0.0

    def consume(self, output: EngineOutput) -> EngineOutput:
        """Evaluate an engine's output and return it without the canary's events. A client's token proves as much as a canary's."""
        if output.token_batches:  # never a canary's: its only token is its last, which comes as an event
            self._health.record_canary(self._ranks_generation)
        for event in output.events:
            if not event.request_id.startswith(PREFIX):
                if event.tokens:
                    self._health.record_canary(self._ranks_generation)
            elif event.finish_reason is not None:
                self._ended(event)
        return EngineOutput([event for event in output.events if not event.request_id.startswith(PREFIX)], output.token_batches)

    def _ended(self, event: TokenEvent) -> None:
        with self._lock:
            if self._pending is None or self._pending[0] != event.request_id:
                return
            generation = self._pending[1]
            self._pending = None
        if event.finish_reason in ("stop", "length"):
            self._health.record_canary(generation)
        elif event.error_kind == InvalidLogits.__name__:  # other errors come from a known loss or a full queue
            self._health.mark_suspect("the ranks give no numbers (NaN or infinity) for a canary")
