"""The cohort against its reference: the same engine with an empty cohort."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.cohort import Cohort
from engine.config import EngineConfig
from engine.draft.draft_model import DraftModelProposer
from engine.draft.lookup import PromptLookup
from engine.draft.speculator import Speculator
from engine.engine import Engine
from engine.fair_share import FairShare
from engine.output import EngineOutput
from engine.request import Request, SamplingParams
from engine.sequence_table import SequenceTable
from tests.fakes.executor import FakeExecutor, Recorder, run_to_end, undisturbed


def life(seed: int) -> tuple[list[list[tuple[int, int, tuple[int, ...], tuple[int, ...]]]], dict, float, int]:
    """The works of every step, the answers, what a tenant was charged, and how many tokens came from cohorts."""
    draw = random.Random(seed)
    executor = FakeExecutor(draw.randint(12, 60), 4, num_stages=draw.choice([1, 1, 2]), num_shards=draw.choice([1, 2]))
    policy = FairShare()
    config = EngineConfig(block_tokens=4, max_step_tokens=draw.randint(4, 24), max_running=draw.randint(2, 8))
    engine, recorder = Engine(executor, config, policy=policy), Recorder()
    by_cohort = 0
    for number in range(draw.randint(2, 9)):
        prompt = tuple(draw.randrange(9) for _ in range(draw.randint(1, 12)))
        sampling = SamplingParams(
            max_tokens=draw.randint(1, 14),
            min_tokens=draw.choice([0, 0, 4]),
            stop_token_ids=tuple(draw.sample(range(1000), draw.choice([0, 8, 60, 200]))),
            seed=draw.randrange(9),
        )
        request = Request(id=str(number), prompt=prompt, sampling=sampling, tenant=draw.choice("ab"), share=draw.choice([1.0, 2.0]))
        recorder.begin(request.key)
        engine.submit(request)
        for _ in range(draw.randint(0, 3)):
            output = engine.turn()
            by_cohort += sum(map(len, output.token_batches))
            recorder.take(output)
    victim = str(draw.randrange(9))
    if draw.random() < 0.3:
        engine.cancel(victim)
    while len(recorder.ends) < len(recorder.tokens):
        output = engine.turn()
        by_cohort += sum(map(len, output.token_batches))
        recorder.take(output)
    steps = [
        sorted((work.sequence, work.start, work.tokens, work.new_blocks and (len(work.new_blocks),)) for work in plan.works)
        for plan in executor.plans
    ]
    answers = {key: (tokens, recorder.ends[key]) for key, tokens in recorder.tokens.items()}
    return steps, answers, policy.served("a"), by_cohort


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_steps_and_answers_are_those_of_sequences_planned_one_by_one(seed: int) -> None:
    together = life(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceTable, "try_join_cohort", lambda _table, _sequence: None)
        singly = life(seed)
    assert singly[3] == 0
    assert together[:2] == singly[:2]
    assert together[2] == pytest.approx(singly[2])


def test_undisturbed_sequences_decode_in_the_cohort() -> None:
    executor = FakeExecutor(num_blocks=256)
    engine, recorder = Engine(executor, EngineConfig(block_tokens=4)), Recorder()
    requests = [Request(id=str(n), prompt=(n, 2, 3), sampling=SamplingParams(max_tokens=12)) for n in range(8)]
    for request in requests:
        recorder.begin(request.key)
        engine.submit(request)
    outputs: list[EngineOutput] = []
    while len(recorder.ends) < len(requests):
        outputs.append(engine.turn())
        recorder.take(outputs[-1])
    assert sum(len(batch) for output in outputs for batch in output.token_batches) == 8 * 10, "all but the first and the last of each"
    assert all(not plan.other_works for plan in executor.plans[1:])
    assert all(recorder.tokens[request.key] == list(undisturbed(request.prompt, 0, 0, 12)) for request in requests)


def test_sequences_with_logprobs_or_grammars_stay_outside_the_cohort() -> None:
    executor = FakeExecutor(num_blocks=256)
    engine, recorder = Engine(executor, EngineConfig(block_tokens=4)), Recorder()
    for number, sampling in enumerate([SamplingParams(max_tokens=4, logprobs=1), SamplingParams(max_tokens=4, grammar="start: /a/")]):
        recorder.begin((str(number), 0))
        engine.submit(Request(id=str(number), prompt=(1, 2), sampling=sampling))
    run_to_end(engine, recorder)
    assert all(len(plan.decodes) == 0 for plan in executor.plans)


@pytest.mark.parametrize("by_ranks", [False, True])
def test_sequences_are_in_the_cohort_while_drafting_is_paused(by_ranks: bool) -> None:
    line = [(0.0, 0.01)]
    executor = FakeExecutor(num_blocks=256)
    executor.draft_model = random.Random(1) if by_ranks else None
    speculator = Speculator(DraftModelProposer() if by_ranks else PromptLookup(), max_tokens=4, step_line=lambda: line[0])
    engine, recorder = Engine(executor, EngineConfig(block_tokens=4), speculator=speculator), Recorder()
    requests = [Request(id=str(n), prompt=(n, 2, 3, 2, 3), sampling=SamplingParams(max_tokens=40)) for n in range(3)]
    for request in requests:
        recorder.begin(request.key)
        engine.submit(request)
    for _ in range(10):
        recorder.take(engine.turn())
    assert [len(plan.decodes) for plan in executor.plans[1:]] == [3] * 9
    line[0] = (1.0, 0.0)
    run_to_end(engine, recorder)
    assert all(len(plan.decodes) == 0 for plan in executor.plans[10:])
    assert any(work.num_draft for plan in executor.plans[10:] for work in plan.other_works) or not by_ranks
    assert all(recorder.tokens[request.key] == list(undisturbed(request.prompt, 0, 0, 40)) for request in requests)


def test_rows_are_reused_and_accounts_without_members_are_dropped() -> None:
    cohort = Cohort(0, 4)
    engine = Engine(FakeExecutor(num_blocks=4096), EngineConfig(block_tokens=4, max_running=4))
    recorder = Recorder()
    for number in range(200):
        request = Request(id=str(number), prompt=(1, 2), sampling=SamplingParams(max_tokens=3), tenant=str(number))
        recorder.begin(request.key)
        engine.submit(request)
    run_to_end(engine, recorder)
    cohort = engine.scheduler.shards[0].cohort
    assert len(cohort) == 0
    assert len(cohort._sequences) == 16
    assert len(cohort._accounts._requests) <= 4
