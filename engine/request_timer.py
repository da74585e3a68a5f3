"""Measures how long each choice waited, was prefilled and was decoded in this engine.

To remove this feature, delete this file and what refers to `RequestTimer`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engine.plan import PhaseTimes, StepPlan, TokenEvent
from engine.request import Request

Key = tuple[str, int]


@dataclass(slots=True)
class _Times:
    admitted_s: float
    planned_s: float | None = None
    first_token_s: float | None = None

    def phase_times(self, now_s: float) -> PhaseTimes:
        planned_s = now_s if self.planned_s is None else self.planned_s
        first_token_s = now_s if self.first_token_s is None else self.first_token_s
        return PhaseTimes(
            queue_s=planned_s - self.admitted_s, prefill_s=max(first_token_s - planned_s, 0.0), decode_s=now_s - first_token_s
        )


class RequestTimer:
    """Called by the engine on its own thread. ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: dict[Key, _Times] = {}

    def admitted(self, request: Request) -> None:
        self._times[request.key] = _Times(self._clock())

    def planned(self, plan: StepPlan) -> None:
        """The first opening of a sequence ends its waiting. After a preemption or a loss it stays in the phase it was in."""
        for new in plan.opened:
            times = self._times.get((new.request_id, new.choice))
            if times is not None and times.planned_s is None:
                times.planned_s = self._clock()

    def add_times(self, events: Sequence[TokenEvent]) -> list[TokenEvent]:
        """The same events, with `phase_times` in the first one with tokens and in the last one of each choice."""
        return [self._with_times(event) for event in events]

    def _with_times(self, event: TokenEvent) -> TokenEvent:
        key = (event.request_id, event.choice)
        times = self._times.get(key)
        if times is None:
            return event
        is_first = times.first_token_s is None and bool(event.tokens)
        if not is_first and event.finish_reason is None:
            return event
        now_s = self._clock()
        if is_first:
            times.first_token_s = now_s
        if event.finish_reason is not None:
            del self._times[key]
        return replace(event, phase_times=times.phase_times(now_s))
