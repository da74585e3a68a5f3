"""A rank that continues with tokens it sampled itself, before they are in a plan: the same answers, launched and replayed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.engine import Engine
from engine.plan import NO_BLOCK, NO_TOKEN, Decodes, StepPlan
from engine.request import Request, SamplingParams
from engine.run.async_step import AsyncStep
from engine.run.decode_rows import decode_rows
from engine.run.local_executor import LocalExecutor, LocalStep
from engine.step_handle import StepHandle
from tests.engine.run.capturable_ranks import capture_steps, open_executor, runner_of, use_capturable_parts
from tests.engine.run.test_end_to_end import answer, sampled_requests, serve
from tests.engine.run.tiny_models import engine_config

CONFIG = engine_config(max_running=6)
UNDECIDED = [
    Request(id=str(n), prompt=(n, 5, 9), sampling=SamplingParams(seed=n, temperature=2.5, top_p=0.97, max_tokens=12)) for n in range(3)
]
"""So flat that a few candidates do not decide a token."""


class Ahead:
    """An executor in this process that runs ahead, and counts the plans without tokens."""

    def __init__(self, executor: LocalExecutor) -> None:
        assert executor.capacity.runs_ahead
        self._executor, self.capacity = executor, executor.capacity
        self.num_promised = self.num_steps = 0

    def submit(self, plan: StepPlan) -> LocalStep:
        self.num_steps += 1
        self.num_promised += int((plan.decodes.columns[2] == NO_TOKEN).sum())
        return self._executor.submit(plan)

    def close(self) -> None:
        self._executor.close()


@pytest.fixture
def executors(dense_folder: Path) -> Iterator[tuple[LocalExecutor, LocalExecutor]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_capturable_parts(monkeypatch)
        told, ahead = (open_executor(dense_folder, num_blocks=60, max_running=6, runs_ahead=ahead) for ahead in (False, True))
        yield told, ahead
        told.close()
        ahead.close()


def test_an_undecided_row_is_redrawn_on_the_device_before_the_next_step_uses_it(
    executors: tuple[LocalExecutor, LocalExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = serve(Engine(executors[0], CONFIG), UNDECIDED)
    monkeypatch.setattr("engine.run.sampling.sampler_graphs.MAX_CANDIDATES", 6)
    ahead = Ahead(executors[1])
    capture_steps(executors[1], CONFIG)
    runner, num_replays, num_steps = runner_of(executors[1]), 0, 0
    assert runner.decode_graphs is not None
    begin, run = runner.begin, runner.decode_graphs.run

    def watched_begin(plan: StepPlan) -> StepHandle:
        nonlocal num_steps
        num_steps += decode_rows(plan, 0) is not None
        return begin(plan)

    def watched_run(*arguments: object) -> object:
        nonlocal num_replays
        num_replays += 1
        return run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "begin", watched_begin)
    monkeypatch.setattr(runner.decode_graphs, "run", watched_run)
    found = serve(Engine(ahead, CONFIG), UNDECIDED)
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    assert ahead.num_promised > 10
    assert num_replays == num_steps, "none was begun twice"


def test_a_step_is_launched_before_the_previous_one_is_read(executors: tuple[LocalExecutor, LocalExecutor]) -> None:
    ahead = Ahead(executors[1])
    capture_steps(executors[1], CONFIG)
    runner, most = runner_of(executors[1]), 0
    begin = runner.begin

    def watched(plan: StepPlan) -> StepHandle:
        nonlocal most
        begun = begin(plan)
        most = max(most, len(runner.async_steps))
        return begun

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "begin", watched)
        serve(Engine(ahead, CONFIG), [Request(id="r", prompt=(1, 2), sampling=SamplingParams(temperature=0.0, max_tokens=9))])
    assert most == 2
    assert not runner.async_steps


@pytest.mark.parametrize("is_replayed", [False, True])
def test_answers_equal_those_of_a_rank_that_is_given_every_token(executors: tuple[LocalExecutor, LocalExecutor], is_replayed: bool) -> None:
    """With penalties, whose histories need tokens that no plan has, with stop ids and preemption."""
    told, ahead = executors[0], Ahead(executors[1])
    graphs = capture_steps(executors[1], CONFIG) if is_replayed else None
    wanted = serve(Engine(told, CONFIG), sampled_requests())
    found = serve(Engine(ahead, CONFIG), sampled_requests())
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    assert [events[-1].finish_reason for events in found.values()] == [wanted[key][-1].finish_reason for key in found]
    assert ahead.num_promised > 20
    assert graphs is None or graphs.num_replays > 20


def test_rows_are_found_at_their_positions_in_the_previous_step() -> None:
    """Sequences may end and start in between, and reuse table rows of others."""

    def step(sequences: list[int], table_rows: list[int]) -> AsyncStep:
        columns = [sequences, [3] * len(sequences), [0] * len(sequences), [NO_BLOCK] * len(sequences), [0] * len(sequences)]
        rows = decode_rows(StepPlan(0, (), decodes=Decodes.of(np.array(columns))), 0)
        assert rows is not None
        return AsyncStep(None, StepPlan(0, ()), rows, np.array(table_rows), np.zeros((11, 0), np.int64), 4, lambda _step: None)

    before = step([5, 9, 7], [2, 0, 1])
    assert before.row_positions(step([5, 9, 7], [2, 0, 1])).tolist() == [0, 1, 2]
    assert before.row_positions(step([7, 5], [1, 2])).tolist() == [2, 0]
    assert before.row_positions(step([9, 11, 12], [0, 2, 6])).tolist() == [1, -1, -1]
