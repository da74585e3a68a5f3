"""The scheduler and the engine with several data-parallel shards and pipeline stages."""

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import SampledTokens, StepPlan, StepResult
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from engine.shard_results import ShardResults
from tests.fakes.executor import FakeExecutor, Recorder, run_to_end, undisturbed


def request_of(id: str, prompt: tuple[int, ...], *, max_tokens: int = 4, **rest: object) -> Request:
    return Request(id=id, prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens), **rest)


def engine_of(executor: FakeExecutor, **config: object) -> Engine:
    return Engine(executor, EngineConfig(block_tokens=executor.capacity.block_tokens, **config))


def answer(engine: Engine, *requests: Request) -> Recorder:
    recorder = Recorder()
    for request in requests:
        recorder.begin(request.key, len(request.committed))
        engine.submit(request)
    run_to_end(engine, recorder)
    return recorder


def shards_of(executor: FakeExecutor) -> dict[str, int]:
    """Where each request was opened last."""
    return {opening.request_id: opening.shard for plan in executor.plans for opening in plan.opened}


def prompt_of(length: int, first: int = 0) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def test_sequences_spread_over_the_shards_by_load():
    executor = FakeExecutor(num_shards=3)
    recorder = answer(engine_of(executor), *(request_of(str(i), prompt_of(9, 100 * i)) for i in range(6)))
    assert sorted(shards_of(executor).values()) == [0, 0, 1, 1, 2, 2]
    assert len(executor.plans[0].works) == 6, "all in one step"
    for i in range(6):
        assert recorder.tokens[str(i), 0] == list(undisturbed(prompt_of(9, 100 * i), 0, 0, 4))


def test_a_long_sequence_counts_for_more_than_a_short_one():
    executor = FakeExecutor(num_shards=2)
    prompts = {"long": prompt_of(40), "a": prompt_of(9, 100), "b": prompt_of(9, 200), "c": prompt_of(9, 300)}
    answer(engine_of(executor), *(request_of(name, prompt) for name, prompt in prompts.items()))
    assert shards_of(executor) == {"long": 0, "a": 1, "b": 1, "c": 1}


def test_a_sequence_goes_to_the_shard_with_its_prefix():
    executor = FakeExecutor(num_shards=2)
    engine = engine_of(executor)
    first, second = prompt_of(16), prompt_of(16, 100)
    answer(engine, request_of("first", first), request_of("second", second))
    assert shards_of(executor) == {"first": 0, "second": 1}
    recorder = answer(engine, request_of("third", (*second, 1, 2)), request_of("fourth", (*first, 1, 2)))
    assert shards_of(executor) | {"third": 1, "fourth": 0} == shards_of(executor)
    assert (recorder.cached["third", 0], recorder.cached["fourth", 0]) == (16, 16)


def test_a_shard_that_is_too_busy_is_avoided_even_if_it_has_the_prefix():
    executor = FakeExecutor(num_shards=2)
    engine = engine_of(executor)
    answer(engine, request_of("before", prompt_of(8)))
    recorder = answer(engine, request_of("busy", prompt_of(60), max_tokens=20), request_of("elsewhere", (*prompt_of(8), 7)))
    assert shards_of(executor) == {"before": 0, "busy": 0, "elsewhere": 1}
    assert recorder.cached["elsewhere", 0] == 0


def test_a_shard_without_room_sends_a_sequence_to_the_next_best():
    executor = FakeExecutor(num_blocks=8, num_shards=2)
    engine = engine_of(executor, prefix_cache=True)
    answer(engine, request_of("before", prompt_of(12), max_tokens=1))
    recorder = answer(engine, request_of("full", prompt_of(8, 100) * 3, max_tokens=8), request_of("other", (*prompt_of(12), 1)))
    assert shards_of(executor)["other"] != shards_of(executor)["full"]
    assert recorder.ends["other", 0] == "length"


def test_each_shard_has_the_whole_token_budget():
    executor = FakeExecutor(num_shards=2)
    engine = engine_of(executor, max_step_tokens=8)
    answer(engine, request_of("a", prompt_of(16)), request_of("b", prompt_of(16, 100)))
    assert [(work.shard, len(work.tokens)) for work in executor.plans[0].works] == [(0, 8), (1, 8)]


def test_a_full_shard_preempts_its_own_sequences():
    executor = FakeExecutor(num_blocks=8, num_shards=2)
    engine = engine_of(executor, prefix_cache=False)
    requests = [request_of(str(i), (i, i + 1, i + 2), max_tokens=20) for i in range(6)]
    recorder = answer(engine, *requests)
    assert engine.stats.num_preemptions > 0
    assert all(recorder.tokens[request.key] == list(undisturbed(request.prompt, 0, 0, 20)) for request in requests)
    assert engine.stats.blocks_free == 16


def test_one_step_per_stage_is_in_flight_and_they_share_the_sequences():
    executor = FakeExecutor(num_stages=3)
    engine = engine_of(executor)
    assert engine.max_in_flight == 3
    recorder = answer(engine, *(request_of(str(i), (i, i + 1, i + 2), max_tokens=12) for i in range(7)))
    decoding = [len(plan.works) for plan in executor.plans[3:12]]
    assert max(decoding) <= 3, decoding
    for earlier, later in zip(executor.plans[1:], executor.plans[2:], strict=False):
        assert not {w.sequence for w in earlier.works} & {w.sequence for w in later.works}, "its next token is not known yet"
    assert all(recorder.tokens[str(i), 0] == list(undisturbed((i, i + 1, i + 2), 0, 0, 12)) for i in range(7))


def test_uneven_steps_even_out_again():
    executor = FakeExecutor(num_stages=2, num_blocks=200)
    engine = engine_of(executor)
    requests = [request_of(f"short-{i}", (i, 1), max_tokens=3) for i in range(6)]
    answer(engine, *requests, *(request_of(f"long-{i}", (i, 2), max_tokens=60) for i in range(6)))
    assert [len(plan.works) for plan in executor.plans[-10:]] == [3] * 10


def test_chunks_of_one_prompt_are_in_flight_together():
    executor = FakeExecutor(num_stages=2)
    scheduler = Scheduler(EngineConfig(block_tokens=4, max_step_tokens=8), executor.capacity)
    scheduler.add(request_of("a", prompt_of(20)))
    plans = [scheduler.schedule() for _ in range(3)]
    assert [(w.start, len(w.tokens), w.samples) for plan in plans for w in plan.works] == [(0, 8, False), (8, 8, False), (16, 4, True)]
    assert scheduler.schedule() is None, "the next token is not known"
    for plan in plans[:2]:
        assert scheduler.apply(plan, StepResult(plan.step, ())) == []
    (event,) = scheduler.apply(plans[2], StepResult(2, (SampledTokens(0, (7,)),)))
    assert event.tokens == (7,)
    assert scheduler.schedule().works[0].start == 20


def test_a_cancelled_prompt_keeps_its_blocks_until_its_last_step_is_answered():
    executor = FakeExecutor(num_stages=2)
    scheduler = Scheduler(EngineConfig(block_tokens=4, max_step_tokens=8), executor.capacity)
    scheduler.add(request_of("a", prompt_of(20)))
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.cancel(("a", 0))
    assert scheduler.schedule() is None
    scheduler.apply(first, StepResult(0, ()))
    assert scheduler.shards[0].pool.num_used == 5
    scheduler.apply(second, StepResult(1, ()))
    assert scheduler.shards[0].pool.num_used == 0


def test_a_prompt_is_cut_so_that_every_stage_has_work():
    prompt = tuple(i % 7 for i in range(900))
    for num_stages, cuts in ((1, [900]), (2, [450, 450]), (3, [300, 300, 300])):
        executor = FakeExecutor(num_blocks=400, num_stages=num_stages)
        answer(engine_of(executor), request_of("a", prompt, max_tokens=1))
        assert [plan.num_tokens for plan in executor.plans] == cuts
        assert executor.num_overlapping == num_stages - 1


def test_a_loss_with_several_steps_in_flight_counts_once():
    first, second = FakeExecutor(num_stages=2), FakeExecutor(num_stages=2)
    first.lose_at_step = {0}
    engine = Engine(first, EngineConfig(block_tokens=4, max_step_tokens=8), recover=lambda loss: second)
    recorder = answer(engine, request_of("a", prompt_of(20)))
    assert recorder.tokens["a", 0] == list(undisturbed(prompt_of(20), 0, 0, 4))
    assert len(first.plans) == 2
    assert engine.stats.num_losses == 1


def test_a_step_has_a_result_once_all_its_shards_have():
    answers = ShardResults(2)
    for part in (StepResult(1, (SampledTokens(5, (50,)),), 0.5), StepResult(2, (), 0.1), StepResult(2, (SampledTokens(7, (70,)),), 0.2)):
        assert answers.take(1) is None
        answers.put(part)
    assert answers.take(2) == StepResult(2, (SampledTokens(7, (70,)),), 0.2)
    answers.put(StepResult(1, (SampledTokens(6, (60,)),), 0.3))
    assert answers.take(1) == StepResult(1, (SampledTokens(5, (50,)), SampledTokens(6, (60,))), 0.5)
    assert answers.take(1) is None


@pytest.mark.parametrize("asked", [1, 2, 5])
def test_max_in_flight_is_at_least_the_number_of_stages(asked):
    assert engine_of(FakeExecutor(num_stages=3), max_in_flight=asked).max_in_flight == max(asked, 3)


def test_a_plan_says_which_shard_each_part_belongs_to():
    scheduler = Scheduler(EngineConfig(block_tokens=4), FakeExecutor(num_shards=2).capacity)
    for name, first in (("a", 0), ("b", 50)):
        scheduler.add(request_of(name, prompt_of(5, first)))
    plan = scheduler.schedule()
    assert isinstance(plan, StepPlan)
    assert [opening.shard for opening in plan.opened] == [work.shard for work in plan.works] == [0, 1]
