"""A request that ends the workers fails alone: after a loss the suspects run one at a time."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import QueueFull
from engine.executor import Capacity
from engine.plan import SampledTokens, StepPlan, StepResult
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from tests.fakes.executor import FakeExecutor, FakeStep, Recorder, run_to_end, undisturbed

POISON = 999


class Poisonable(FakeExecutor):
    """Workers that end whenever they compute a certain token, at or after a certain position of its sequence."""

    def __init__(self, *, from_position: int = 0, **options: int) -> None:
        super().__init__(**options)
        self._from = from_position
        self._poisonous: set[int] = set()

    def submit(self, plan: StepPlan) -> FakeStep:
        self._poisonous |= {work.sequence for work in plan.works if POISON in work.tokens}
        reached = (work.sequence in self._poisonous and work.start + len(work.tokens) > self._from for work in plan.works)
        if any(reached):
            self.lose_at_step.add(len(self.plans))
        return super().submit(plan)


def engine_with(**options: int) -> Engine:
    return Engine(Poisonable(**options), EngineConfig(block_tokens=4), recover=lambda _loss: Poisonable(**options))


def run(engine: Engine, requests: Iterable[Request]) -> Recorder:
    recorder = Recorder()
    for request in requests:
        recorder.begin(request.key)
        engine.submit(request)
    run_to_end(engine, recorder)
    return recorder


def good(number: int, max_tokens: int = 6) -> Request:
    return Request(id=f"good-{number}", prompt=(number, 2, 3), sampling=SamplingParams(max_tokens=max_tokens))


def is_golden(recorder: Recorder, request: Request) -> bool:
    return recorder.tokens[request.key] == list(undisturbed(request.prompt, 0, 0, request.sampling.max_tokens))


@pytest.mark.parametrize("from_position", [0, 4, 7], ids=["at once", "at the first tokens", "later"])
@pytest.mark.parametrize("num_blocks", [12, 256], ids=["little room", "much room"])
def test_one_poisoned_request_among_thirty_one_others_fails_alone(from_position: int, num_blocks: int) -> None:
    engine = engine_with(from_position=from_position, num_blocks=num_blocks)
    requests = [good(number, max_tokens=12) for number in range(31)]
    poison = Request(id="poison", prompt=(1, POISON, 3), sampling=SamplingParams(max_tokens=12))
    recorder = run(engine, [*requests[:15], poison, *requests[15:]])
    assert recorder.errors[poison.key] == "PoisonedRequest"
    assert all(is_golden(recorder, request) for request in requests)
    assert engine.stats.num_losses == 2
    assert engine.stats.blocks_used == 0


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_two_poisoned_requests_fail_and_all_others_finish_in_any_order(data: st.DataObject) -> None:
    poisons = [Request(id=f"poison-{n}", prompt=(n, POISON), sampling=SamplingParams(max_tokens=4)) for n in range(2)]
    goods = [good(number) for number in range(data.draw(st.integers(0, 6)))]
    order = data.draw(st.permutations([*poisons, *goods]))
    engine = engine_with(num_blocks=data.draw(st.integers(5, 40)))
    recorder = run(engine, order)
    assert {recorder.errors[poison.key] for poison in poisons} == {"PoisonedRequest"}
    assert all(is_golden(recorder, request) for request in goods)


def test_a_suspect_of_another_replica_runs_alone_before_it_runs_with_others() -> None:
    engine = engine_with()
    recorder = run(engine, [good(1), Request(id="suspect", prompt=(5, 6), losses=1, sampling=SamplingParams(max_tokens=4)), good(2)])
    assert {recorder.ends[key] for key in recorder.ends} == {"length"}
    plans = engine.executor.plans  # type: ignore[attr-defined]
    number = next(o.sequence for plan in plans for o in plan.opened if o.request_id == "suspect")
    with_suspect = [plan for plan in plans if any(work.sequence == number for work in plan.works)]
    assert [len(plan.works) for plan in with_suspect[:2]] == [1, 1]
    assert len(with_suspect[2].works) > 1, "and then it runs with all"


def test_nothing_else_starts_while_a_suspect_is_in_flight() -> None:
    """Otherwise a newcomer that ends the workers would have the suspect blamed too."""
    scheduler = Scheduler(EngineConfig(block_tokens=4, max_in_flight=2), Capacity(num_blocks=64, block_tokens=4, max_context_tokens=256))
    scheduler.add(Request(id="suspect", prompt=(5, 6), losses=1, sampling=SamplingParams(max_tokens=4)))
    scheduler.add(good(1))
    alone = scheduler.schedule()
    assert alone is not None
    assert [opening.request_id for opening in alone.opened] == ["suspect"]
    assert scheduler.schedule() is None
    scheduler.apply(alone, StepResult(alone.step, (SampledTokens(alone.works[0].sequence, (7,)),)))
    again = scheduler.schedule()
    assert again is not None
    assert not again.opened, "it has still a token to give alone"


def test_a_suspect_of_another_replica_that_loses_the_workers_alone_is_poisoned() -> None:
    engine = engine_with()
    poison = Request(id="p", prompt=(POISON,), losses=1, sampling=SamplingParams(max_tokens=4))
    recorder = run(engine, [good(1), poison, good(2)])
    assert recorder.errors["p", 0] == "PoisonedRequest"
    assert engine.stats.num_losses == 1


def test_a_suspect_that_finds_no_room_is_not_overtaken_by_those_that_come_after_it() -> None:
    """It needs three blocks of four. The others need two each, and whenever one of them ends there is another."""
    engine = Engine(FakeExecutor(num_blocks=4, block_tokens=4), EngineConfig(block_tokens=4, prefix_cache=False))
    ended: list[str] = []

    def small(number: int, max_tokens: int = 3) -> Request:
        return Request(id=str(number), prompt=(number, *range(4)), sampling=SamplingParams(max_tokens=max_tokens))

    engine.submit(small(0))
    engine.submit(small(1, max_tokens=2))
    engine.turn()
    engine.submit(Request(id="suspect", prompt=tuple(range(9)), losses=1, sampling=SamplingParams(max_tokens=3)))
    for number in range(2, 40):
        engine.submit(small(number))
    while len(ended) < 40:
        ended += [event.request_id for event in engine.turn().events if event.finish_reason]
    assert sorted(ended[:2]) == ["0", "1"]
    assert ended.index("suspect") == 2


def test_a_request_survives_two_losses_from_outside_even_if_alone_in_the_second() -> None:
    """A second fault within seconds of the first hits whichever suspect is running just then."""
    executors = [FakeExecutor() for _ in range(3)]
    executors[0].lose_at_step = {2}
    executors[1].lose_at_step = {4}
    executors[1].is_killed_from_outside = True
    engine = Engine(executors[0], EngineConfig(block_tokens=4), recover=lambda _loss: executors[1 if executors[1].plans == [] else 2])
    requests = [good(number, max_tokens=12) for number in range(4)]
    recorder = run(engine, requests)
    assert len(executors[1].plans[-1].works) == 1, "one was tried alone"
    assert engine.stats.num_losses == 2
    assert all(is_golden(recorder, request) for request in requests)


def test_two_unrelated_losses_fail_no_request() -> None:
    executors = [FakeExecutor() for _ in range(3)]
    executors[0].lose_at_step = {2}
    executors[1].lose_at_step = {12}
    engine = Engine(executors[0], EngineConfig(block_tokens=4), recover=lambda _loss: executors[1 if executors[1].plans == [] else 2])
    requests = [good(number, max_tokens=12) for number in range(4)]
    recorder = run(engine, requests)
    assert engine.stats.num_losses == 2
    assert all(is_golden(recorder, request) for request in requests)


def test_a_loss_is_reported_by_an_event_with_the_number_of_losses() -> None:
    lost = FakeExecutor()
    lost.lose_at_step = {1}
    engine = Engine(lost, EngineConfig(block_tokens=4), recover=lambda _loss: FakeExecutor())
    engine.submit(good(1))
    engine.turn()
    (event,) = engine.turn()
    assert (event.tokens, event.finish_reason, event.losses) == ((), None, 1)


def test_a_full_queue_accepts_a_retry_from_another_replica() -> None:
    engine = Engine(FakeExecutor(), EngineConfig(block_tokens=4, max_waiting=1))
    moved = Request(id="moved", prompt=(9,), attempt=1, committed=undisturbed((9,), 0, 0, 2), sampling=SamplingParams(max_tokens=4))
    recorder = Recorder()
    for request in (good(1), moved):
        recorder.begin(request.key, len(request.committed))
        engine.submit(request)
    with pytest.raises(QueueFull):
        engine.submit(good(2))
    run_to_end(engine, recorder)
    assert recorder.ends["moved", 0] == "length"
