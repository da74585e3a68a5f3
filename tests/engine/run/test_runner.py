"""One rank's runner against transformers, with plans written by hand."""

import pytest
import torch

from engine.errors import WorkersLost
from engine.plan import NewSequence, StepPlan, Work
from engine.request import SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.run.runner import sampling_ranks
from parallel.topology import Topology
from tests.engine.run.tiny_models import engine_config, float32_config, greedy

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple((7 * i * i + 3 * i + 5) % 290 for i in range(21))


@pytest.fixture(scope="module")
def executor(folder):
    executor = LocalExecutor.open(folder, runner_config=float32_config(num_blocks=64, block_tokens=4), engine_config=engine_config())
    yield executor
    executor.close()


def run(executor, plan: StepPlan) -> dict[int, int]:
    return {sampled.sequence: sampled.tokens[0] for sampled in executor.submit(plan).result().sampled}


def blocks_for(first: int, tokens: int) -> tuple[int, ...]:
    return tuple(range(first, first + -(-tokens // 4)))


def test_a_prompt_and_what_follows_are_what_transformers_generates(executor, oracle):
    opening = NewSequence(10, 0, len(PROMPT), GREEDY)
    answer = [run(executor, StepPlan(1, (Work(10, 0, PROMPT, blocks_for(5, 40), True),), (opening,)))[10]]
    while len(answer) < 15:
        start = len(PROMPT) + len(answer) - 1
        answer.append(run(executor, StepPlan(2, (Work(10, start, (answer[-1],), (), True),)))[10])
    assert tuple(answer) == greedy(oracle, PROMPT, 15)
    executor.submit(StepPlan(3, (), closed=(10, 77)))


def test_a_chunked_prompt_and_a_running_sequence_do_not_affect_each_other(executor, oracle):
    other = PROMPT[::-1]
    expected, expected_other = greedy(oracle, PROMPT, 4), greedy(oracle, other, 1)
    steps = [
        StepPlan(1, (Work(20, 0, PROMPT, blocks_for(0, 40), True),), (NewSequence(20, 0, len(PROMPT), GREEDY),)),
        StepPlan(2, (Work(21, 0, other[:9], (30, 12, 44), False), Work(20, 21, expected[:1], (), True)), (NewSequence(21, 0, 21, GREEDY),)),
        StepPlan(3, (Work(20, 22, expected[1:2], (), True), Work(21, 9, other[9:10], (), False))),
        StepPlan(4, (Work(21, 10, other[10:], (11, 50, 49), True), Work(20, 23, expected[2:3], (), True))),
    ]
    results = [run(executor, step) for step in steps]
    assert [result.get(20) for result in results] == list(expected)
    assert [result.get(21) for result in results] == [None, None, None, expected_other[0]]
    executor.submit(StepPlan(5, (), closed=(20, 21)))


def test_a_step_may_compute_without_sampling_and_may_do_nothing_at_all(executor):
    plan = StepPlan(8, (Work(40, 0, PROMPT, blocks_for(0, 21), False),), (NewSequence(40, 0, 30, GREEDY),))
    result = executor.submit(plan).result()
    assert (result.step, result.sampled) == (8, ())
    assert result.elapsed_s > 0
    assert executor.submit(StepPlan(9, (), closed=(40,))).result().sampled == ()


def test_history_counts_tokens_of_later_works(executor, oracle):
    """The penalties of the third output token see the prompt from the opening and the first two tokens from the works."""
    params = SamplingParams(temperature=0.0, repetition_penalty=2.5, presence_penalty=4.0, frequency_penalty=-30.0)
    opening = NewSequence(50, 0, len(PROMPT), params, history=PROMPT)
    answer = list(run(executor, StepPlan(1, (Work(50, 0, PROMPT, blocks_for(0, 40), True),), (opening,))).values())
    for _ in range(11):
        start = len(PROMPT) + len(answer) - 1
        answer += run(executor, StepPlan(1, (Work(50, start, (answer[-1],), (), True),))).values()
    again = NewSequence(51, 0, len(PROMPT), params, history=(*PROMPT, *answer[:5]))
    work = Work(51, 0, (*PROMPT, *answer[:5]), blocks_for(20, 40), True)
    assert run(executor, StepPlan(2, (work,), (again,))) == {51: answer[5]}
    assert run(executor, StepPlan(3, (Work(51, len(PROMPT) + 5, (answer[5],), (), True),))) == {51: answer[6]}

    expected: list[int] = []
    for _ in answer:
        with torch.no_grad():
            logits = oracle(torch.tensor([[*PROMPT, *expected]])).logits[0, -1, :290].clone()
        seen = torch.tensor(sorted({*PROMPT, *expected}))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 2.5, logits[seen] * 2.5)
        for token in set(expected):
            logits[token] -= 4.0 - 30.0 * expected.count(token)
        expected.append(int(logits.argmax()))
    assert answer == expected
    assert answer != list(greedy(oracle, PROMPT, 12))
    executor.submit(StepPlan(5, (), closed=(50, 51)))


def test_a_failed_step_ends_the_rank_and_reports_why(dense_folder):
    executor = LocalExecutor.open(dense_folder, runner_config=float32_config(num_blocks=8, block_tokens=4), engine_config=engine_config())
    unknown = StepPlan(1, (Work(99, 0, (1,), (0,), True),))
    with pytest.raises(WorkersLost, match="step 1") as caught:
        executor.submit(unknown).result()
    assert caught.value.rank == 0
    assert "Traceback" in caught.value.rank_traceback
    with pytest.raises(WorkersLost, match="after the end"):
        executor.submit(StepPlan(2, ())).result()
    executor.close()


@pytest.mark.parametrize(
    ("topology", "ranks"),
    [(Topology(tp=4), (0,)), (Topology(tp=2, pp=3), (4,)), (Topology(dp=3), (0, 1, 2)), (Topology(tp=2, dp=2, pp=2), (4, 6))],
)
def test_the_first_rank_of_each_shards_last_stage_samples(topology, ranks):
    assert sampling_ranks(topology) == ranks
    last = topology.pp - 1
    assert [topology.coordinates(rank) for rank in ranks] == [
        coordinates for coordinates in map(topology.coordinates, range(topology.size)) if (coordinates.pp, coordinates.tp) == (last, 0)
    ]
