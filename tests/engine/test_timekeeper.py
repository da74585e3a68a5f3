"""The time that a choice spends in the engine is told phase by phase."""

from engine.plan import Opening, StepPlan, TokenEvent
from engine.request import Request, SamplingParams
from engine.timekeeper import Timekeeper


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def opening(request: Request) -> StepPlan:
    return StepPlan(0, (), (Opening(0, request.choice, 1, SamplingParams(), request_id=request.id),))


def event(request: Request, *tokens: int, end: bool = False) -> TokenEvent:
    return TokenEvent(
        request_id=request.id, choice=request.choice, attempt=0, offset=0, tokens=tokens, finish_reason="stop" if end else None
    )


def test_waiting_reading_and_answering_are_told_apart() -> None:
    clock, request = Clock(), Request(id="a", prompt=(1,))
    keeper = Timekeeper(clock)
    keeper.admitted(request)
    clock.now_s += 1
    keeper.planned(opening(request))
    clock.now_s += 2
    (first,) = keeper.told([event(request, 7)])
    clock.now_s += 4
    (middle,) = keeper.told([event(request, 8)])
    (last,) = keeper.told([event(request, 9, end=True)])
    assert first.spent is not None
    assert (first.spent.queue_s, first.spent.prefill_s, first.spent.decode_s) == (1, 2, 0)
    assert middle.spent is None
    assert last.spent is not None
    assert (last.spent.queue_s, last.spent.prefill_s, last.spent.decode_s) == (1, 2, 4)


def test_a_second_opening_after_a_preemption_does_not_begin_the_reading_again() -> None:
    clock, request = Clock(), Request(id="a", prompt=(1,))
    keeper = Timekeeper(clock)
    keeper.admitted(request)
    keeper.planned(opening(request))
    clock.now_s += 5
    keeper.planned(opening(request))
    (first,) = keeper.told([event(request, 7)])
    assert first.spent is not None
    assert (first.spent.queue_s, first.spent.prefill_s) == (0, 5)


def test_a_choice_that_was_never_planned_has_only_waited() -> None:
    clock, request = Clock(), Request(id="a", prompt=(1,))
    keeper = Timekeeper(clock)
    keeper.admitted(request)
    clock.now_s += 3
    (end,) = keeper.told([event(request, end=True)])
    assert end.spent is not None
    assert (end.spent.queue_s, end.spent.prefill_s, end.spent.decode_s) == (3, 0, 0)


def test_nothing_is_kept_of_a_choice_that_ended() -> None:
    keeper, request = Timekeeper(Clock()), Request(id="a", prompt=(1,))
    keeper.admitted(request)
    keeper.told([event(request, end=True)])
    assert keeper.told([event(request, 1, end=True)])[0].spent is None
