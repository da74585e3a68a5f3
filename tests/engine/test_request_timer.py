"""The time that a choice spends in the engine is measured by phase."""

from engine.plan import NewSequence, StepPlan, TokenEvent
from engine.request import Request, SamplingParams
from engine.request_timer import RequestTimer


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def opening(request: Request) -> StepPlan:
    return StepPlan(0, (), (NewSequence(0, request.choice, 1, SamplingParams(), request_id=request.id),))


def event(request: Request, *tokens: int, end: bool = False) -> TokenEvent:
    return TokenEvent(
        request_id=request.id, choice=request.choice, attempt=0, offset=0, tokens=tokens, finish_reason="stop" if end else None
    )


def test_queue_prefill_and_decode_times_are_separate() -> None:
    clock, request = Clock(), Request(id="a", prompt=(1,))
    timer = RequestTimer(clock)
    timer.admitted(request)
    clock.now_s += 1
    timer.planned(opening(request))
    clock.now_s += 2
    (first,) = timer.add_times([event(request, 7)])
    clock.now_s += 4
    (middle,) = timer.add_times([event(request, 8)])
    (last,) = timer.add_times([event(request, 9, end=True)])
    assert first.phase_times is not None
    assert (first.phase_times.queue_s, first.phase_times.prefill_s, first.phase_times.decode_s) == (1, 2, 0)
    assert middle.phase_times is None
    assert last.phase_times is not None
    assert (last.phase_times.queue_s, last.phase_times.prefill_s, last.phase_times.decode_s) == (1, 2, 4)


def test_prefill_time_does_not_restart_after_a_preemption() -> None:
    clock, request = Clock(), Request(id="a", prompt=(1,))
    timer = RequestTimer(clock)
    timer.admitted(request)
    timer.planned(opening(request))
    clock.now_s += 5
    timer.planned(opening(request))
    (first,) = timer.add_times([event(request, 7)])
    assert first.phase_times is not None
    assert (first.phase_times.queue_s, first.phase_times.prefill_s) == (0, 5)


def test_a_choice_that_was_never_planned_has_only_queue_time() -> None:
    clock, request = Clock(), Request(id="a", prompt=(1,))
    timer = RequestTimer(clock)
    timer.admitted(request)
    clock.now_s += 3
    (end,) = timer.add_times([event(request, end=True)])
    assert end.phase_times is not None
    assert (end.phase_times.queue_s, end.phase_times.prefill_s, end.phase_times.decode_s) == (3, 0, 0)


def test_a_choice_that_ended_is_forgotten() -> None:
    timer, request = RequestTimer(Clock()), Request(id="a", prompt=(1,))
    timer.admitted(request)
    timer.add_times([event(request, end=True)])
    assert timer.add_times([event(request, 1, end=True)])[0].phase_times is None
