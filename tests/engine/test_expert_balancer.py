"""Experts are moved between two steps, when that is due or requested, and no answer changes."""

import threading
import time
from dataclasses import replace

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineStopped, WorkersLost
from engine.plan import Rebalance, RebalanceResult, StepPlan, StepResult
from engine.request import Request, SamplingParams
from tests.fakes.executor import FakeExecutor, Recorder, run_to_end, undisturbed

FOUND = RebalanceResult(loads=((3.0, 1.0),), imbalance_before=1.5, imbalance_after=1.0, num_moved=2)


class BalancingExecutor(FakeExecutor):
    """An executor whose ranks have experts. Checks that no step is in flight while they are moved."""

    def __init__(self, answer: RebalanceResult | None = FOUND, num_stages: int = 1) -> None:
        super().__init__()
        self._capacity = replace(self._capacity, num_stages=num_stages)
        self.answer = answer
        self.orders: list[tuple[int, Rebalance]] = []
        """With the number of steps that were answered before."""
        self.num_answered = 0

    def run(self, index: int) -> StepResult:
        plan: StepPlan = self.plans[index]
        assert index == self.num_answered
        self.num_answered += 1
        result = super().run(index)
        if plan.rebalance is None:
            return result
        assert not plan.works
        assert len(self.plans) == self.num_answered, "a step is under way behind it"
        self.orders.append((index - len(self.orders), plan.rebalance))
        return replace(result, rebalanced=self.answer)


def requests() -> list[Request]:
    sampling = SamplingParams(max_tokens=10)
    return [Request(id=str(number), prompt=tuple(range(number + 1)), sampling=sampling) for number in range(3)]


def serve(engine: Engine) -> dict[tuple[str, int], list[int]]:
    recorder = Recorder()
    for request in requests():
        recorder.begin(request.key)
        engine.submit(request)
    run_to_end(engine, recorder)
    assert set(recorder.ends.values()) == {"length"}
    return recorder.tokens


EXPECTED = {request.key: list(undisturbed(request.prompt, 0, 0, 10)) for request in requests()}


@pytest.mark.parametrize("num_stages", [1, 3])
def test_experts_are_rebalanced_every_so_many_steps_and_answers_stay_the_same(num_stages: int) -> None:
    executor = BalancingExecutor(num_stages=num_stages)
    engine = Engine(executor, EngineConfig(block_tokens=4, rebalance_every_steps=3, rebalance_threshold=1.3))
    assert serve(engine) == EXPECTED
    assert [order for _, order in executor.orders] == [Rebalance(1.3)] * len(executor.orders)
    steps = [step for step, _ in executor.orders]
    assert len(steps) >= 3
    assert all(3 <= later - earlier < 3 + num_stages for earlier, later in zip([0, *steps], steps, strict=False))
    assert (engine.stats.expert_moves, engine.stats.expert_imbalance) == (2 * len(steps), 1.0)


def test_there_is_no_rebalance_unless_configured() -> None:
    executor = BalancingExecutor()
    assert serve(Engine(executor, EngineConfig(block_tokens=4))) == EXPECTED
    assert executor.orders == []


def test_a_model_without_experts_is_rebalanced_once() -> None:
    executor = BalancingExecutor(answer=RebalanceResult())
    assert serve(Engine(executor, EngineConfig(block_tokens=4, rebalance_every_steps=2))) == EXPECTED
    assert len(executor.orders) == 1


def test_a_requested_rebalance_runs_on_an_idle_engine() -> None:
    engine = Engine(BalancingExecutor(), EngineConfig(block_tokens=4))
    answers = [engine.rebalance_experts(), engine.rebalance_experts(2.0)]
    assert engine.turn() == []
    assert [answer.done() for answer in answers] == [True, False]
    assert engine.turn() == []
    assert [answer.result(0) for answer in answers] == [FOUND, FOUND]
    assert [order.threshold for _, order in engine.executor.orders] == [1.0, 2.0]


def test_losing_ranks_during_a_rebalance_fails_its_future_and_replaces_them() -> None:
    first, second = BalancingExecutor(), BalancingExecutor()
    engine = Engine(first, EngineConfig(block_tokens=4), recover=lambda _loss: second)
    recorder = Recorder()
    for request in requests():
        recorder.begin(request.key)
        engine.submit(request)
    for _ in range(4):
        recorder.take(engine.turn())
    answer = engine.rebalance_experts()
    first.lose_at_step = {len(first.plans)}
    run_to_end(engine, recorder)
    assert isinstance(answer.exception(0), WorkersLost)
    assert recorder.tokens == EXPECTED


def test_stopping_fails_pending_rebalances() -> None:
    engine = Engine(BalancingExecutor(), EngineConfig(block_tokens=4))
    answer = engine.rebalance_experts()
    engine.stop()
    engine.run_forever(lambda _events: None)
    assert isinstance(answer.exception(0), EngineStopped)
    with pytest.raises(EngineStopped):
        engine.rebalance_experts()


@pytest.mark.parametrize("fails", [False, True])
def test_a_rebalance_that_nobody_waits_for_any_more_is_no_error(fails: bool) -> None:
    executor = BalancingExecutor()
    engine = Engine(executor, EngineConfig(block_tokens=4), recover=lambda _loss: BalancingExecutor())
    if fails:
        executor.lose_at_step = {0}
    answers = [engine.rebalance_experts(), engine.rebalance_experts()]
    answers[0].cancel()
    while not answers[1].done():
        engine.turn()
    assert answers[0].cancelled()
    assert isinstance(answers[1].exception(0), WorkersLost) if fails else answers[1].result(0) == FOUND


def test_an_engine_that_loses_its_last_workers_without_a_request_ends() -> None:
    executor = BalancingExecutor()
    executor.lose_at_step = {0}
    engine, ended = Engine(executor, EngineConfig(block_tokens=4)), []

    def run() -> None:
        try:
            engine.run_forever(lambda _events: None)
        except WorkersLost as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    time.sleep(0.2)  # until it sleeps
    assert isinstance(engine.rebalance_experts().exception(10), WorkersLost)
    thread.join(10)
    engine.stop()  # a thread that still waits
    assert ended


@pytest.mark.parametrize("changes", [{"rebalance_every_steps": 0}, {"rebalance_threshold": 0.9}, {"rebalance_threshold": float("nan")}])
def test_invalid_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        EngineConfig(**changes)
