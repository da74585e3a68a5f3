"""Running ahead: steps are planned before the previous one is answered, and the answers are the same."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import NO_TOKEN, Decodes, SampledTokens, StepPlan
from engine.request import Request, SamplingParams
from engine.run.last_tokens import LastTokens, with_known_tokens
from tests.fakes.executor import FakeExecutor, Recorder, run_to_end, undisturbed


def serve(requests: list[Request], executor: FakeExecutor, config: EngineConfig, between: random.Random) -> tuple[Engine, Recorder]:
    engine, recorder = Engine(executor, config), Recorder()
    for request in requests:
        recorder.begin(request.key)
        engine.submit(request)
        for _ in range(between.randint(0, 3)):
            recorder.take(engine.turn())
    run_to_end(engine, recorder)
    while engine.scheduler.num_running:
        recorder.take(engine.turn())
    return engine, recorder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_answers_ended_by_a_stop_id_or_by_length_do_not_change(seed: int) -> None:
    draw = random.Random(seed)
    executor = FakeExecutor(draw.randint(12, 60), 4, num_shards=draw.choice([1, 2]), runs_ahead=True)
    config = EngineConfig(
        block_tokens=4, max_step_tokens=draw.randint(4, 24), max_running=draw.randint(2, 8), max_in_flight=draw.choice([1, 1, 3])
    )
    requests = [
        Request(
            id=str(number),
            prompt=tuple(draw.randrange(9) for _ in range(draw.randint(1, 12))),
            sampling=SamplingParams(
                max_tokens=draw.randint(1, 14), stop_token_ids=tuple(draw.sample(range(1000), draw.choice([0, 60, 200]))), seed=number
            ),
        )
        for number in range(draw.randint(1, 9))
    ]
    engine, recorder = serve(requests, executor, config, draw)
    for request in requests:
        sampling = request.sampling
        wanted = undisturbed(request.prompt, sampling.seed, 0, sampling.max_tokens, sampling.stop_token_ids)
        assert recorder.tokens[request.key] == list(wanted)
        assert recorder.ends[request.key] == ("stop" if wanted[-1] in sampling.stop_token_ids else "length")
    assert not any(shard.pool.num_used for shard in engine.scheduler.shards)


def test_a_sequence_is_planned_ahead_by_one_step_and_not_beyond_its_last_token() -> None:
    executor = FakeExecutor(num_blocks=64, runs_ahead=True)
    request = Request(id="r", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=8))
    _, recorder = serve([request], executor, EngineConfig(block_tokens=4), random.Random(1))
    assert recorder.tokens[request.key] == list(undisturbed(request.prompt, 0, 0, 8))
    assert [work.start for plan in executor.plans for work in plan.works] == [0, 3, 4, 5, 6, 7, 8, 9]
    assert executor.num_promised == 6, "all but the prompt and the token behind it"
    assert executor.num_broken == 0


def test_one_row_is_computed_behind_a_stop_id_and_then_dropped() -> None:
    prompt = (5, 6)
    stop = undisturbed(prompt, 0, 0, 6)[4]
    executor = FakeExecutor(num_blocks=64, runs_ahead=True)
    request = Request(id="r", prompt=prompt, sampling=SamplingParams(max_tokens=20, stop_token_ids=(stop,)))
    engine, recorder = serve([request], executor, EngineConfig(block_tokens=4), random.Random(1))
    assert recorder.tokens[request.key] == list(undisturbed(prompt, 0, 0, 5))
    assert recorder.ends[request.key] == "stop"
    assert len(executor.plans) == 6
    assert engine.stats.blocks_used == 0


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_sequence_outside_the_cohort_misses_no_step(num_shards: int) -> None:
    """A sequence with log-probabilities is in no cohort: it gets a token from every step, as without running ahead."""
    requests = [Request(id=str(n), prompt=(n, 2), sampling=SamplingParams(max_tokens=12, seed=n)) for n in range(3)]
    requests.append(Request(id="told", prompt=(7, 7), sampling=SamplingParams(max_tokens=7, logprobs=1)))
    counts = []
    for runs_ahead in (False, True):
        executor = FakeExecutor(num_blocks=64, num_shards=num_shards, runs_ahead=runs_ahead)
        engine, recorder = Engine(executor, EngineConfig(block_tokens=4)), Recorder()
        for request in requests:
            recorder.begin(request.key)
            engine.submit(request)
        run_to_end(engine, recorder)
        counts.append(len(executor.plans))
        assert all(
            recorder.tokens[one.key] == list(undisturbed(one.prompt, one.sampling.seed, 0, one.sampling.max_tokens)) for one in requests
        )
    assert counts[0] == counts[1]
    assert executor.num_promised > 0, "when it has ended the others go ahead"


def rows_after_first_token(executor: FakeExecutor) -> dict[str, list[int]]:
    """For each request, the steps that had a row for it, from its first token on."""
    opened = {opening.sequence: opening for plan in executor.plans for opening in plan.opened}
    rows: dict[str, list[int]] = {}
    for step, plan in enumerate(executor.plans):
        for work in plan.works:
            opening = opened[work.sequence]
            if work.start + len(work.tokens) >= opening.num_prompt:
                rows.setdefault(opening.request_id, []).append(step)
    return rows


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("beside", [{}, {"logprobs": 1}, {"grammar": "start: /a/"}], ids=str)
@pytest.mark.parametrize(("length", "every"), [(300, 100), (2, 3), (9, 1)])
def test_no_decoding_sequence_misses_a_step_when_prompts_arrive(
    length: int, every: int, beside: dict[str, object], num_shards: int, runs_ahead: bool
) -> None:
    """Long ones that are cut, and short ones in close order, beside streams in the cohort and one outside of it."""
    executor = FakeExecutor(num_blocks=600, num_shards=num_shards, runs_ahead=runs_ahead)
    engine, recorder = Engine(executor, EngineConfig(block_tokens=4, max_step_tokens=24)), Recorder()
    requests = [Request(id=f"stream {n}", prompt=(n, 2), sampling=SamplingParams(max_tokens=40, seed=n)) for n in range(3)]
    requests.append(Request(id="beside", prompt=(7, 7), sampling=SamplingParams(max_tokens=33, **beside)))
    requests += [Request(id=f"late {n}", prompt=(n,) * length, sampling=SamplingParams(max_tokens=2 + n % 4)) for n in range(8)]
    due = [0] * 4 + [4 + every * n for n in range(8)]
    for request, step in zip(requests, due, strict=True):
        while len(executor.plans) < step and engine.scheduler.num_requests:
            recorder.take(engine.turn())
        recorder.begin(request.key)
        engine.submit(request)
    run_to_end(engine, recorder)
    rows = rows_after_first_token(executor)
    assert len(rows) == len(requests)
    for request in requests:
        steps = rows[request.id]
        assert len(steps) == request.sampling.max_tokens
        assert steps == list(range(steps[0], steps[-1] + 1)), f"{request.id} sits steps out"
        assert recorder.tokens[request.key] == list(undisturbed(request.prompt, request.sampling.seed, 0, request.sampling.max_tokens))
    assert bool(executor.num_promised) == runs_ahead


def test_it_can_be_turned_off() -> None:
    executor = FakeExecutor(num_blocks=64, runs_ahead=True)
    request = Request(id="r", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=8))
    engine, _ = serve([request], executor, EngineConfig(block_tokens=4, run_ahead=False), random.Random(1))
    assert engine.max_in_flight == 1
    assert executor.num_promised == 0


def test_nothing_is_planned_ahead_if_the_ranks_do_not_keep_tokens() -> None:
    executor = FakeExecutor(num_blocks=64)
    requests = [Request(id=str(n), prompt=(n, 2), sampling=SamplingParams(max_tokens=9)) for n in range(3)]
    serve(requests, executor, EngineConfig(block_tokens=4, max_in_flight=3), random.Random(1))
    assert not any((plan.decodes.columns[2] == NO_TOKEN).any() for plan in executor.plans)


@pytest.mark.parametrize("tokens", [(7, 8, 9), (7, NO_TOKEN, 9)])
def test_a_rank_fills_in_what_it_sampled_itself(tokens: tuple[int, ...]) -> None:
    last_tokens = LastTokens()
    first = Decodes.of([[1, 2, 3], [5, 5, 5], [0, 0, 0], [-1, -1, -1], [0, 0, 0]])
    last_tokens.record(first, Decodes.of([list(tokens)]).packed, [SampledTokens(2, (30, 40))] if NO_TOKEN in tokens else [])
    plan = StepPlan(1, (), decodes=Decodes.of([[1, 2, 4], [6, 6, 6], [NO_TOKEN, NO_TOKEN, 11], [-1, -1, -1], [0, 0, 0]]))
    assert with_known_tokens(plan, last_tokens).decodes.columns[2].tolist() == [7, 40 if NO_TOKEN in tokens else 8, 11]
    assert with_known_tokens(StepPlan(2, ()), last_tokens) == StepPlan(2, ())


def test_the_newer_of_two_tokens_counts_and_closed_sequences_are_forgotten() -> None:
    last_tokens = LastTokens()
    both = Decodes.of([[1, 2], [5, 5], [0, 0], [-1, -1], [0, 0]])
    one = Decodes.of([[2], [6], [0], [-1], [0]])
    last_tokens.record(both, Decodes.of([[10, 20]]).packed, [])
    last_tokens.record(both, Decodes.of([[11, 21]]).packed, [])
    last_tokens.record(one, Decodes.of([[22]]).packed, [SampledTokens(7, (70,))])
    assert dict(last_tokens) == {1: 11, 2: 22, 7: 70}
    last_tokens.record(both, Decodes.of([[12, NO_TOKEN]]).packed, [])
    last_tokens.forget(7)
    assert dict(last_tokens) == {1: 12, 2: 22}
