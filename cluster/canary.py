"""The proof that a replica can make tokens: a request of its own for one token, through the engine and all ranks.

While clients' tokens flow they are the proof: a canary may find the queue full.
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
"""Of the request ids of canaries. No id of a client has a slash."""


class Canary:
    """Sends canaries and reads their answers. At most one is under way in each generation of `Health`."""

    def __init__(self, health: Health, submit: Callable[[Request], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._health, self._submit, self._clock = health, submit, clock
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._under_way: tuple[str, int, float] | None = None
        self._ranks_generation = health.generation

    def send(self) -> None:
        """Ask for a token, unless one that would prove the same is awaited already."""
        hit("canary.send")
        with self._lock:
            generation = self._health.generation
            if self._under_way is not None and self._under_way[1] == generation:
                return
            request_id = f"{PREFIX}{next(self._numbers)}"
            self._under_way = (request_id, generation, self._clock())
        sampling = SamplingParams(temperature=0.0, max_tokens=1)
        try:
            self._submit(Request(id=request_id, prompt=(0,), sampling=sampling, salt=PREFIX, priority=-(2**31)))
        except (EngineStopped, QueueFull):  # nothing is left to be proved, or what fills the queue will prove it
            self._under_way = None

    def note_restart(self) -> None:
        """What the engine gives from now on can only come from ranks that start now, as the earlier ones have ended."""
        self._ranks_generation = self._health.generation

    @property
    def pending_s(self) -> float:
        """For how long an answer has been awaited; 0 when none is."""
        under_way = self._under_way
        return self._clock() - under_way[2] if under_way else 0.0

    def take(self, output: EngineOutput) -> EngineOutput:
        """Keep the canary's own events and give the rest back. A client's token proves as much as a canary's."""
        if output.token_batches:  # a canary is never in there: its first token is its last
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
            if self._under_way is None or self._under_way[0] != event.request_id:
                return
            generation = self._under_way[1]
            self._under_way = None
        if event.finish_reason in ("stop", "length"):
            self._health.record_canary(generation)
        elif event.error_kind == InvalidLogits.__name__:  # other errors are of a loss, which is known, or of a full queue
            self._health.mark_suspect("the ranks give no numbers (NaN or infinity) for a canary")
