"""The scheduler against an executor that checks every slot it reads."""

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import DuplicateRequest, EmptyPrompt, KvCacheTooSmall, PromptTooLong, QueueFull
from engine.plan import SampledTokens, StepResult
from engine.policy import ShortestPromptFirst
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from tests.fakes.executor import FakeExecutor, Recorder, run_to_end, undisturbed


def request_of(id: str, prompt: tuple[int, ...], *, max_tokens: int = 4, **rest: object) -> Request:
    sampling = {key: rest.pop(key) for key in ("seed", "stop_token_ids", "min_tokens", "presence_penalty") if key in rest}
    return Request(id=id, prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens, **sampling), **rest)


def engine_of(executor: FakeExecutor, **config: object) -> Engine:
    return Engine(executor, EngineConfig(block_tokens=executor.capacity.block_tokens, **config))


def answer(engine: Engine, *requests: Request) -> Recorder:
    recorder = Recorder()
    for request in requests:
        recorder.begin(request.key, len(request.committed))
        engine.submit(request)
    run_to_end(engine, recorder)
    return recorder


def test_a_second_request_with_the_same_prompt_computes_only_its_last_block():
    executor = FakeExecutor(block_tokens=4)
    engine = engine_of(executor)
    prompt = tuple(range(10))
    answer(engine, request_of("a", prompt, max_tokens=1))
    recorder = answer(engine, request_of("b", prompt, max_tokens=1))
    assert executor.plans[-1].works[0].start == 8
    assert recorder.cached["b", 0] == 8


def test_a_prompt_that_is_cached_to_its_end_still_computes_its_last_token():
    executor = FakeExecutor(block_tokens=4)
    engine = engine_of(executor)
    prompt = tuple(range(8))
    answer(engine, request_of("a", prompt, max_tokens=5))
    recorder = answer(engine, request_of("b", prompt, max_tokens=5))
    assert recorder.tokens["b", 0] == list(undisturbed(prompt, 0, 0, 5))
    assert recorder.cached["b", 0] == 4


def test_another_salt_shares_nothing():
    engine = engine_of(FakeExecutor())
    prompt = tuple(range(9))
    answer(engine, request_of("a", prompt, salt="one"))
    assert answer(engine, request_of("b", prompt, salt="two")).cached["b", 0] == 0


def test_requests_that_arrive_together_compute_a_common_prefix_once():
    executor = FakeExecutor(block_tokens=4)
    engine = engine_of(executor, max_step_tokens=8)
    prompt = tuple(range(20))
    requests = [Request(id="r", choice=c, prompt=prompt, sampling=SamplingParams(max_tokens=3, seed=5)) for c in range(4)]
    recorder = answer(engine, *requests)
    computed = sum(plan.num_tokens for plan in executor.plans)
    assert computed == 20 + 3 * 4 + 4 * 2, "the prompt once, each other's last block, and two steps of decoding each"
    assert all(recorder.tokens["r", c] == list(undisturbed(prompt, 5, c, 3)) for c in range(4))


def test_a_long_prompt_is_chunked_and_short_ones_run_beside_it():
    executor = FakeExecutor()
    engine = engine_of(executor, max_step_tokens=6)
    recorder = Recorder()
    for request in (request_of("short", (1, 2), max_tokens=6), request_of("long", tuple(range(30)), max_tokens=1)):
        recorder.begin(request.key)
        engine.submit(request)
    run_to_end(engine, recorder)
    mixed = [plan for plan in executor.plans if len(plan.works) == 2]
    assert len(mixed) >= 5
    assert all(plan.num_tokens <= 6 for plan in executor.plans)
    assert all(len(plan.works[0].tokens) == 1 for plan in mixed[1:]), "decoding comes first"


def test_a_pool_that_is_too_small_for_all_preempts_and_answers_the_same():
    executor = FakeExecutor(num_blocks=8, block_tokens=4)
    engine = engine_of(executor)
    requests = [request_of(str(i), (i, i + 1, i + 2), max_tokens=20, seed=i) for i in range(4)]
    recorder = answer(engine, *requests)
    assert engine.stats.num_preemptions > 0
    for i in range(4):
        assert recorder.tokens[str(i), 0] == list(undisturbed((i, i + 1, i + 2), i, 0, 20))
    assert engine.scheduler.shards[0].pool.num_used == 0


def test_the_last_to_arrive_is_preempted_and_a_more_urgent_one_never_is():
    executor = FakeExecutor(num_blocks=6, block_tokens=4)
    engine = engine_of(executor, prefix_cache=False)
    recorder = Recorder()
    order = []
    for name, priority in (("late", 0), ("urgent", -1)):
        request = request_of(name, (1, 2, 3), max_tokens=18, priority=priority)
        recorder.begin(request.key)
        engine.submit(request)
    while engine.scheduler.num_requests or not order:
        events = engine.turn()
        recorder.take(events)
        order += [event.request_id for event in events if event.finish_reason]
    assert engine.stats.num_preemptions > 0
    assert order == ["urgent", "late"]


def test_a_stop_token_ends_the_answer_and_is_its_last_token():
    prompt = (1, 2, 3)
    expected = undisturbed(prompt, 0, 0, 8)
    recorder = answer(engine_of(FakeExecutor()), request_of("a", prompt, max_tokens=8, stop_token_ids=(expected[2],)))
    assert recorder.tokens["a", 0] == list(expected[:3])
    assert recorder.ends["a", 0] == "stop"


def test_a_stop_token_before_min_tokens_is_an_ordinary_token():
    prompt = (1, 2, 3)
    expected = undisturbed(prompt, 0, 0, 8)
    recorder = answer(engine_of(FakeExecutor()), request_of("a", prompt, max_tokens=8, min_tokens=3, stop_token_ids=(expected[2],)))
    assert recorder.tokens["a", 0] == list(expected)


def test_the_context_ends_an_answer_as_max_tokens_does():
    recorder = answer(engine_of(FakeExecutor(max_context_tokens=10)), request_of("a", (1,) * 7, max_tokens=50))
    assert len(recorder.tokens["a", 0]) == 3
    assert recorder.ends["a", 0] == "length"


def test_an_answer_continues_after_the_committed_tokens():
    prompt = (4, 5, 6)
    expected = undisturbed(prompt, 9, 1, 10)
    request = request_of("a", prompt, max_tokens=10, seed=9, choice=1, committed=expected[:6], attempt=1)
    assert answer(engine_of(FakeExecutor()), request).tokens["a", 1] == list(expected[6:])


def test_one_fault_fails_one_sequence():
    executor = FakeExecutor()
    executor.faulty = {1}
    recorder = answer(engine_of(executor), request_of("a", (1, 2), choice=0), request_of("a", (1, 2), choice=1))
    assert recorder.ends == {("a", 0): "length", ("a", 1): "error"}
    assert recorder.errors["a", 1] == "InvalidLogits"


def test_a_cancelled_request_ends_at_once_and_its_blocks_are_kept_until_the_step_in_flight_is_applied():
    scheduler = Scheduler(EngineConfig(block_tokens=4), FakeExecutor().capacity)
    scheduler.add(request_of("a", (1, 2, 3)))
    plan = scheduler.schedule()
    (event,) = scheduler.cancel(("a", 0))
    assert event.finish_reason == "cancelled"
    assert scheduler.shards[0].pool.num_used == 1
    assert scheduler.cancel(("a", 0)) == []
    assert scheduler.apply(plan, StepResult(plan.step, (SampledTokens(0, (7,)),))) == []
    assert scheduler.shards[0].pool.num_used == 0
    assert scheduler.schedule() is None, "closing alone is no reason for a step"
    scheduler.add(request_of("b", (1, 2, 3)))
    assert scheduler.schedule().closed == (0,)


def test_requests_that_cannot_be_admitted_get_an_error():
    executor = FakeExecutor(num_blocks=4, block_tokens=4, max_context_tokens=30)
    scheduler = Scheduler(EngineConfig(block_tokens=4, max_waiting=1), executor.capacity)
    for committed in ((), (5,)):
        with pytest.raises(EmptyPrompt):
            scheduler.add(request_of("a", (), committed=committed))
    with pytest.raises(PromptTooLong, match="30 tokens"):
        scheduler.add(request_of("a", (1,) * 30))
    with pytest.raises(KvCacheTooSmall, match="lower max_tokens"):
        scheduler.add(request_of("a", (1,) * 10, max_tokens=8))
    scheduler.add(request_of("a", (1,) * 10, max_tokens=7))
    with pytest.raises(DuplicateRequest):
        scheduler.add(request_of("a", (1,)))
    with pytest.raises(QueueFull):
        scheduler.add(request_of("b", (1,)))


def test_a_deadline_ends_a_request_wherever_it_is():
    now = [100.0]
    engine = Engine(FakeExecutor(), EngineConfig(block_tokens=4, max_running=1), clock=lambda: now[0])
    recorder = Recorder()
    for name in ("running", "waiting"):
        request = request_of(name, (1, 2), max_tokens=50, deadline_s=105.0)
        recorder.begin(request.key)
        engine.submit(request)
    recorder.take(engine.turn())
    now[0] = 105.0
    recorder.take(engine.turn())
    assert set(recorder.errors.values()) == {"DeadlineExceeded"}
    assert len(recorder.ends) == 2
    assert engine.scheduler.shards[0].pool.num_used == 0


def test_history_is_sent_to_the_ranks_only_if_sampling_needs_it():
    executor = FakeExecutor()
    answer(engine_of(executor), request_of("a", (1, 2)), request_of("b", (3, 4), presence_penalty=1.0))
    histories = [opening.history for plan in executor.plans for opening in plan.opened]
    assert histories == [(), (3, 4)]


def test_another_policy_serves_short_prompts_first():
    executor = FakeExecutor()
    engine = Engine(executor, EngineConfig(block_tokens=4, max_running=1), policy=ShortestPromptFirst())
    order = []
    for name, length in (("long", 9), ("short", 2), ("middle", 5)):
        engine.submit(request_of(name, tuple(range(length)), max_tokens=1))
    while len(order) < 3:
        order += [event.request_id for event in engine.turn() if event.finish_reason]
    assert order == ["short", "middle", "long"]
