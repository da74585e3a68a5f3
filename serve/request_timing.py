"""Where the time of a request went. Clients can ask for it; traces and metrics are made from it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from engine.plan import PhaseTimes, TokenEvent


@dataclass(frozen=True, kw_only=True)
class RequestTiming:
    """Seconds. They add up to the whole time of the request in the server, measured on the choice that ended last."""

    front_s: float
    """Reading, authenticating, validating, rendering the template, tokenizing."""
    queue_s: float
    prefill_s: float
    decode_s: float
    network_s: float
    """Between front and engine, both ways, and waiting for the front's event loop."""
    detokenise_s: float

    @property
    def total_s(self) -> float:
        return self.front_s + self.queue_s + self.prefill_s + self.decode_s + self.network_s + self.detokenise_s

    def server_timing(self) -> str:
        """The value of a `Server-Timing` header (W3C), in milliseconds."""
        entries = {field.name.removesuffix("_s"): getattr(self, field.name) for field in fields(self)} | {"total": self.total_s}
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in entries.items())


class Stopwatch:
    """Measures one request from its arrival (`time.monotonic`) on."""

    def __init__(self, arrived_s: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_s = clock() if arrived_s is None else arrived_s
        self._submitted_s: float | None = None
        self._detokenise_s = 0.0

    def submitted(self) -> None:
        """The request goes to the engine: the front's part is done."""
        self._submitted_s = self._clock()

    def now(self) -> float:
        return self._clock()

    def detokenised(self, since_s: float) -> None:
        """Adds the time since ``since_s``, a result of `now`. (Called for every token; a context manager would take four times as long.)"""
        self._detokenise_s += self._clock() - since_s

    def timing(self, phase_times: PhaseTimes) -> RequestTiming:
        """``phase_times``: the engine's times of the choice that ended last."""
        now_s = self._clock()
        submitted_s = now_s if self._submitted_s is None else self._submitted_s
        known_s = phase_times.queue_s + phase_times.prefill_s + phase_times.decode_s + self._detokenise_s
        return RequestTiming(
            front_s=submitted_s - self._started_s,
            queue_s=phase_times.queue_s,
            prefill_s=phase_times.prefill_s,
            decode_s=phase_times.decode_s,
            network_s=max(now_s - submitted_s - known_s, 0.0),
            detokenise_s=self._detokenise_s,
        )


class EngineTimes:
    """The times that the engine reports for one choice."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent: PhaseTimes | None = None
        self._first_s = 0.0

    def take(self, event: TokenEvent) -> None:
        if event.phase_times is not None:
            self._first_s = self._first_s or self._clock()
            self._spent = event.phase_times

    def at_end(self, event: TokenEvent) -> PhaseTimes | None:
        """The times at the event that ended the choice. If the engine did not end it (but a stop string), decoding ends now."""
        if self._spent is None or event.finish_reason is not None:
            return self._spent
        return replace(self._spent, decode_s=self._clock() - self._first_s)
