"""A real rank that is told to go on with what it sampled itself: the same answers, launched and replayed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.plan import NO_TOKEN, StepPlan
from engine.run.local_executor import DoneStep, LocalExecutor
from tests.engine.run.captured import have_replayed, open_executor, runner_of, use_capturable_parts
from tests.engine.run.test_end_to_end import answer, sampled_requests, serve
from tests.engine.run.tiny_models import engine_config

CONFIG = engine_config(max_running=6)


class Ahead:
    """Says of a rank in this process that it runs ahead, and counts what it is promised."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self.capacity = replace(executor.capacity, runs_ahead=True)
        runner_of(executor).capacity = self.capacity
        self.num_promised = 0

    def submit(self, plan: StepPlan) -> DoneStep:
        self.num_promised += int((plan.decodes.columns[2] == NO_TOKEN).sum())
        return self._executor.submit(plan)

    def close(self) -> None:
        self._executor.close()


@pytest.fixture
def executors(dense_folder: Path) -> Iterator[tuple[LocalExecutor, LocalExecutor]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_capturable_parts(monkeypatch)
        both = (open_executor(dense_folder, num_blocks=60, max_running=6), open_executor(dense_folder, num_blocks=60, max_running=6))
        yield both
        for one in both:
            one.close()


@pytest.mark.parametrize("is_replayed", [False, True])
def test_answers_are_those_of_a_rank_that_is_told_every_token(executors: tuple[LocalExecutor, LocalExecutor], is_replayed: bool) -> None:
    """With penalties, whose histories must have what nobody told, with stop ids and preemption."""
    told, ahead = executors[0], Ahead(executors[1])
    graphs = have_replayed(executors[1], CONFIG) if is_replayed else None
    wanted = serve(Engine(told, CONFIG), sampled_requests())
    found = serve(Engine(ahead, CONFIG), sampled_requests())
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    assert [events[-1].finish_reason for events in found.values()] == [wanted[key][-1].finish_reason for key in found]
    assert ahead.num_promised > 20
    assert graphs is None or graphs.num_replays > 20
