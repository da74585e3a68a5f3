"""The engine: every accepted request gets its final event, whatever happens to the workers."""

import threading
import time

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineStopped, QueueFull, WorkersLost
from engine.fair_share import FairShare
from engine.request import Request, SamplingParams
from tests.fakes.executor import FakeExecutor, Recorder, run_to_end, undisturbed

CONFIG = EngineConfig(block_tokens=4)


def request_of(id: str, *, max_tokens: int = 6, **rest: object) -> Request:
    return Request(id=id, prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=max_tokens), **rest)


def expected(max_tokens: int = 6) -> list[int]:
    return list(undisturbed((1, 2, 3), 0, 0, max_tokens))


def test_after_a_loss_new_workers_go_on_and_the_answer_is_the_same():
    first, second = FakeExecutor(), FakeExecutor()
    first.lose_at_step = {3}
    losses = []

    def recover(loss: WorkersLost) -> FakeExecutor:
        losses.append(loss)
        return second

    engine = Engine(first, CONFIG, recover=recover)
    recorder = Recorder()
    recorder.begin(("a", 0))
    engine.submit(request_of("a"))
    run_to_end(engine, recorder)
    assert recorder.tokens["a", 0] == expected()
    assert [loss.rank for loss in losses] == [0]
    assert second.plans, "the second executor did the rest"
    assert engine.stats.num_losses == 1


@pytest.mark.parametrize("from_outside", [False, True])
def test_a_request_in_the_lost_steps_of_too_many_losses_is_poisoned_and_others_live(from_outside: bool):
    num_losses = 3 if from_outside else 2
    executors = [FakeExecutor() for _ in range(num_losses + 1)]
    for executor in executors[:-1]:
        executor.lose_at_step, executor.is_killed_from_outside = {0}, from_outside
    remaining = iter(executors[1:])
    engine = Engine(executors[0], EngineConfig(block_tokens=4, max_running=1), recover=lambda loss: next(remaining))
    recorder = Recorder()
    for name in ("poison", "innocent"):
        recorder.begin((name, 0))
        engine.submit(request_of(name))
    run_to_end(engine, recorder)
    assert recorder.errors["poison", 0] == "PoisonedRequest"
    assert recorder.tokens["innocent", 0] == expected()
    assert engine.stats.num_losses == num_losses


def test_cancellations_and_deadlines_are_handled_while_new_workers_start():
    now = [0.0]
    executor = FakeExecutor()
    executor.lose_at_step = {0}
    back = threading.Event()

    def recover(loss: WorkersLost) -> FakeExecutor:
        back.wait(20)
        return FakeExecutor()

    engine = Engine(executor, CONFIG, recover=recover, clock=lambda: now[0])
    recorder = Recorder()
    for request in (request_of("cancelled"), request_of("late", deadline_s=5.0), request_of("patient")):
        recorder.begin(request.key)
        engine.submit(request)
    recorder.take(engine.turn())
    assert engine.is_recovering
    engine.cancel("cancelled")
    now[0] = 6.0
    recorder.take(engine.turn())
    assert recorder.ends == {("cancelled", 0): "cancelled", ("late", 0): "error"}
    back.set()
    run_to_end(engine, recorder)
    assert recorder.tokens["patient", 0] == expected()


@pytest.mark.parametrize("recover", [None, lambda loss: (_ for _ in ()).throw(RuntimeError("no more machines"))])
def test_without_recovery_every_request_fails_and_the_engine_stops(recover):
    executor = FakeExecutor()
    executor.lose_at_step = {1}
    engine = Engine(executor, CONFIG, recover=recover)
    recorder = Recorder()
    for name in ("a", "b"):
        recorder.begin((name, 0))
        engine.submit(request_of(name))
    with pytest.raises((WorkersLost, EngineStopped)):
        engine.run_forever(recorder.take)
    assert set(recorder.ends.values()) == {"error"}
    assert len(recorder.ends) == 2
    with pytest.raises(EngineStopped):
        engine.submit(request_of("c"))


def test_an_exception_in_the_scheduler_fails_the_requests_and_does_not_hang(monkeypatch):
    engine = Engine(FakeExecutor(), CONFIG)
    monkeypatch.setattr(engine.scheduler, "schedule", lambda **_options: 1 / 0)
    recorder = Recorder()
    recorder.begin(("a", 0))
    engine.submit(request_of("a"))
    with pytest.raises(ZeroDivisionError):
        engine.run_forever(recorder.take)
    assert recorder.errors["a", 0] == "EngineStopped"


def test_a_request_that_cannot_be_admitted_fails_alone_by_an_event():
    engine = Engine(FakeExecutor(max_context_tokens=20), CONFIG)
    recorder = Recorder()
    for request in (Request(id="long", prompt=(1,) * 40), request_of("good")):
        recorder.begin(request.key)
        engine.submit(request)
    run_to_end(engine, recorder)
    assert recorder.errors["long", 0] == "PromptTooLong"
    assert recorder.tokens["good", 0] == expected()


def test_requests_that_do_not_fit_smaller_new_workers_fail():
    big, small = FakeExecutor(num_blocks=32), FakeExecutor(num_blocks=2)
    big.lose_at_step = {2}
    engine = Engine(big, CONFIG, recover=lambda loss: small)
    recorder = Recorder()
    for request in (request_of("large", max_tokens=40), request_of("little", max_tokens=3)):
        recorder.begin(request.key)
        engine.submit(request)
    run_to_end(engine, recorder)
    assert recorder.errors["large", 0] == "KvCacheTooSmall"
    assert recorder.ends["little", 0] == "length"


def test_the_loop_sleeps_while_idle_and_wakes_for_a_request():
    engine = Engine(FakeExecutor(), CONFIG)
    turns = []
    original = engine.turn

    def counted():
        turns.append(1)
        return original()

    engine.turn = counted
    recorder = Recorder()
    recorder.begin(("a", 0))
    thread = threading.Thread(target=engine.run_forever, args=(recorder.take,))
    thread.start()
    time.sleep(0.2)
    assert len(turns) <= 2
    engine.submit(request_of("a"))
    deadline = time.monotonic() + 20
    while ("a", 0) not in recorder.ends and time.monotonic() < deadline:
        time.sleep(0.01)
    engine.stop()
    thread.join(20)
    assert not thread.is_alive()
    assert recorder.tokens["a", 0] == expected()


def test_stopping_ends_what_is_running_with_an_error():
    engine = Engine(FakeExecutor(num_blocks=4096), EngineConfig(block_tokens=4))
    recorder = Recorder()
    recorder.begin(("a", 0))
    engine.submit(request_of("a", max_tokens=10_000))

    def stop_after_the_first(events):
        recorder.take(events)
        engine.stop()

    engine.run_forever(stop_after_the_first)
    assert recorder.errors["a", 0] == "EngineStopped"


def test_a_full_queue_rejects_on_submit_while_a_step_is_in_flight():
    """And not only after that step and the one after it."""
    executor = FakeExecutor()
    engine = Engine(executor, EngineConfig(block_tokens=4, max_running=1, max_waiting=2), policy=FairShare())
    recorder = Recorder()
    for name in "abceg":
        recorder.begin((name, 0))
    for name in "abc":
        engine.submit(request_of(name))
        recorder.take(engine.turn())
    with pytest.raises(QueueFull):
        engine.submit(request_of("d"))
    engine.submit(request_of("e", tenant="another"))  # a part of the queue is its own
    with pytest.raises(QueueFull):
        engine.submit(request_of("f", tenant="another"))
    engine.submit(request_of("g", attempt=1))  # accepted before, by another replica
    run_to_end(engine, recorder)
    assert set(recorder.ends.values()) == {"length"}
    assert engine.stats.num_waiting == 0


def test_a_burst_on_an_idle_engine_is_rejected_as_the_scheduler_would():
    engine = Engine(FakeExecutor(), EngineConfig(block_tokens=4, max_running=4, max_waiting=2))
    for name in "ab":
        engine.submit(request_of(name))
    with pytest.raises(QueueFull):
        engine.submit(request_of("c"))
    engine.turn()
    engine.submit(request_of("d"))
