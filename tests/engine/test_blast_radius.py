"""A fault of one request, or of the ranks, is contained: nothing else fails, and nothing is leaked."""

import threading
import time
from collections.abc import Callable

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import WorkersLost
from engine.executor import Capacity
from engine.kv.block_pool import BlockPool
from engine.plan import SampledTokens, StepPlan, StepResult, TokenEvent
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from tests.fakes.executor import FakeExecutor, Recorder, run_to_end, undisturbed

CONFIG = EngineConfig(block_tokens=4, max_step_tokens=8)
CAPACITY = Capacity(num_blocks=32, block_tokens=4, max_context_tokens=128)


def request_of(id: str, prompt: tuple[int, ...] = (1, 2, 3), *, committed: tuple[int, ...] = (), **sampling: object) -> Request:
    return Request(id=id, prompt=prompt, committed=committed, sampling=SamplingParams(**{"max_tokens": 4, **sampling}))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within 60 s"
        time.sleep(0.005)


def test_blocks_of_a_faulty_sequence_are_not_shared():
    scheduler = Scheduler(CONFIG, CAPACITY)
    prompt = tuple(range(12))
    scheduler.add(request_of("faulty", prompt))
    first, last = scheduler.schedule(), None
    assert not scheduler.apply(first, StepResult(first.step, ())), "a part of the prompt, no token yet"
    assert scheduler.shards[0].pool.find(scheduler.shards[0].open[0].keys(2, 4)), "published: nothing was known against it"
    last = scheduler.schedule()
    (event,) = scheduler.apply(last, StepResult(last.step, (SampledTokens(0, (), fault="NaN"),)))
    assert event.error_kind == "InvalidLogits"
    assert (scheduler.shards[0].pool.num_used, scheduler.shards[0].pool.num_cached) == (0, 0)
    scheduler.add(request_of("next", prompt))
    assert scheduler.schedule().works[0].start == 0


def test_forgotten_blocks_stay_with_their_owners_or_become_free():
    pool = BlockPool(4)
    kept, left = pool.allocate(2)
    pool.publish(kept, b"kept")
    pool.publish(left, b"left")
    pool.release([left])
    pool.forget([kept, left])
    assert pool.find([b"kept"]) == pool.find([b"left"]) == []
    assert (pool.num_used, pool.num_cached, pool.num_free) == (1, 0, 3)


def test_a_sequence_that_got_no_token_fails_alone():
    scheduler = Scheduler(CONFIG, CAPACITY)
    scheduler.add(request_of("forgotten"))
    scheduler.add(request_of("served"))
    plan = scheduler.schedule()
    events = scheduler.apply(plan, StepResult(plan.step, (SampledTokens(1, (7,)),)))
    assert [(event.request_id, event.error_kind) for event in events] == [("forgotten", "InvalidLogits"), ("served", None)]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_invalid_tokens_fail_only_their_request(prefix_cache):
    engine = Engine(FakeExecutor(), EngineConfig(block_tokens=4, prefix_cache=prefix_cache))
    recorder = Recorder()
    for request in (request_of("good"), request_of("bad", (1, 2, 2**70, 4, 5)), request_of("worse", (1, "2", 3, 4, 5))):
        recorder.begin(request.key)
        engine.submit(request)
    run_to_end(engine, recorder)
    assert recorder.tokens["good", 0] == list(undisturbed((1, 2, 3), 0, 0, 4))
    assert (recorder.errors["bad", 0], recorder.errors["worse", 0]) == ("EngineError", "EngineError")


@pytest.mark.parametrize(
    ("sampling", "reason", "stop_token"),
    [({"max_tokens": 2}, "length", None), ({"stop_token_ids": (9,)}, "stop", 9), ({"max_tokens": 2, "stop_token_ids": (9,)}, "stop", 9)],
)
def test_a_request_whose_whole_answer_is_committed_only_ends(sampling, reason, stop_token):
    executor = FakeExecutor()
    engine = Engine(executor, CONFIG)
    engine.submit(request_of("a", committed=(8, 9), **sampling))
    (event,) = engine.turn()
    assert (event.offset, event.tokens, event.finish_reason, event.stop_token) == (2, (), reason, stop_token)
    assert not executor.plans
    assert not engine.scheduler.num_requests


def test_a_committed_stop_token_before_min_tokens_does_not_end_the_answer():
    scheduler = Scheduler(CONFIG, CAPACITY)
    assert scheduler.add(request_of("a", committed=(9,), min_tokens=1, stop_token_ids=(9,))) == []


class Confused(FakeExecutor):
    """Answers its second step with another step's number."""

    def run(self, index: int) -> StepResult:
        result = super().run(index)
        return StepResult(result.step + 5, result.sampled) if index == 1 else result


def test_ranks_that_answer_with_the_wrong_step_are_replaced():
    losses: list[WorkersLost] = []
    engine = Engine(Confused(), CONFIG, recover=lambda loss: losses.append(loss) or FakeExecutor())
    recorder = Recorder()
    recorder.begin(("a", 0))
    engine.submit(request_of("a"))
    run_to_end(engine, recorder)
    assert len(losses) == 1
    assert recorder.tokens["a", 0] == list(undisturbed((1, 2, 3), 0, 0, 4))


def test_counters_do_not_go_back_when_workers_are_replaced():
    first = FakeExecutor()
    first.lose_at_step = {3}
    engine = Engine(first, CONFIG, recover=lambda loss: FakeExecutor())
    recorder = Recorder()
    queried = []
    recorder.begin(("a", 0))
    engine.submit(request_of("a", tuple(range(9)), max_tokens=6))
    while not recorder.ends:
        recorder.take(engine.turn())
        queried.append(engine.stats.prefix_queried_tokens)
    assert engine.stats.num_losses == 1
    assert queried == sorted(queried)
    assert queried[0] == 9


def test_a_request_is_counted_from_submit_to_its_end():
    engine = Engine(FakeExecutor(), CONFIG)
    counts = [engine.stats.num_waiting]
    engine.submit(request_of("a"))
    counts.append(engine.stats.num_waiting + engine.stats.num_running)
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events += engine.turn()
        counts.append(engine.stats.num_waiting + engine.stats.num_running)
    assert counts == [0, 1, 1, 1, 1, 0]


def test_workers_that_start_after_the_engine_stopped_are_closed():
    first, late = FakeExecutor(), FakeExecutor()
    first.lose_at_step = {0}
    may_come = threading.Event()
    engine = Engine(first, CONFIG, recover=lambda loss: may_come.wait(10) and late)
    ends: list[TokenEvent] = []
    thread = threading.Thread(target=engine.run_forever, args=(ends.extend,))
    thread.start()
    engine.submit(request_of("a"))
    wait_until(lambda: engine.is_recovering)
    engine.stop()
    wait_until(lambda: any(event.finish_reason for event in ends))
    assert [event.error_kind for event in ends if event.finish_reason] == ["EngineStopped"]
    assert thread.is_alive(), "the loop is not left while workers that nobody else knows may still come"
    may_come.set()
    thread.join(10)
    assert late.closed


def test_a_plan_that_cannot_be_submitted_counts_as_a_loss():
    class Gone(FakeExecutor):
        def submit(self, plan: StepPlan) -> None:
            raise WorkersLost("the pipe is broken", rank=1)

    engine = Engine(Gone(), CONFIG, recover=lambda loss: FakeExecutor())
    recorder = Recorder()
    recorder.begin(("a", 0))
    engine.submit(request_of("a"))
    run_to_end(engine, recorder)
    assert recorder.tokens["a", 0] == list(undisturbed((1, 2, 3), 0, 0, 4))
