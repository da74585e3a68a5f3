"""Where the time of one request went: the ledger that a client may ask for, and that traces and metrics are written from."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from engine.plan import PhaseTimes, TokenEvent


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Seconds. The entries add up to the request's whole time in the server, of the choice that ended last."""

    front_s: float
    """Read, authorised, checked, put through the template, tokenised."""
    queue_s: float
    prefill_s: float
    decode_s: float
    network_s: float
    """Between front and engine, both ways, and what the front's event loop was busy with otherwise."""
    detokenise_s: float

    @property
    def total_s(self) -> float:
        return self.front_s + self.queue_s + self.prefill_s + self.decode_s + self.network_s + self.detokenise_s

    def server_timing(self) -> str:
        """As the value of a `Server-Timing` header (W3C): milliseconds."""
        entries = {field.name.removesuffix("_s"): getattr(self, field.name) for field in fields(self)} | {"total": self.total_s}
        return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in entries.items())


class Stopwatch:
    """Runs beside one request, from its arrival (`time.monotonic`) on."""

    def __init__(self, arrived_s: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_s = clock() if arrived_s is None else arrived_s
        self._submitted_s: float | None = None
        self._detokenise_s = 0.0

    def submitted(self) -> None:
        """The front's own part before the engine is over."""
        self._submitted_s = self._clock()

    def now(self) -> float:
        return self._clock()

    def detokenised(self, since_s: float) -> None:
        """``since_s``: what `now` said before. (Two calls, as this is done for every token: a context manager takes four times as long.)"""
        self._detokenise_s += self._clock() - since_s

    def ledger(self, phase_times: PhaseTimes) -> Ledger:
        """``phase_times``: of the choice that ended last."""
        now_s = self._clock()
        submitted_s = now_s if self._submitted_s is None else self._submitted_s
        known_s = phase_times.queue_s + phase_times.prefill_s + phase_times.decode_s + self._detokenise_s
        return Ledger(
            front_s=submitted_s - self._begun_s,
            queue_s=phase_times.queue_s,
            prefill_s=phase_times.prefill_s,
            decode_s=phase_times.decode_s,
            network_s=max(now_s - submitted_s - known_s, 0.0),
            detokenise_s=self._detokenise_s,
        )


class EngineTimes:
    """What the engine said it spent on one choice."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: PhaseTimes | None = None
        self._first_s = 0.0

    def take(self, event: TokenEvent) -> None:
        if event.phase_times is not None:
            self._first_s = self._first_s or self._clock()
            self._told = event.phase_times

    def at_end(self, event: TokenEvent) -> PhaseTimes | None:
        """With the event that ended the choice. Where that is not the engine's end (a stop string), decoding ends here."""
        if self._told is None or event.finish_reason is not None:
            return self._told
        return replace(self._told, decode_s=self._clock() - self._first_s)
