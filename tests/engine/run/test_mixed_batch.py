"""Mixed steps whose sampling is replayed and which run ahead, against a rank that gets every token and samples row by row."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from engine.engine import Engine
from engine.plan import NO_TOKEN, NewSequence, StepPlan, Work
from engine.request import Pooling, Request, SamplingParams
from engine.run.async_step import AsyncStep
from engine.run.local_executor import LocalExecutor
from engine.run.mixed_batch import mixed_batch
from engine.run.settings import RunnerConfig
from tests.engine.run.capturable_ranks import capture_steps, engine_over, open_executor, runner_of, use_capturable_parts
from tests.engine.run.test_async_steps import Ahead
from tests.engine.run.test_decode_graphs import PLAIN
from tests.engine.run.test_end_to_end import PROMPTS, SAMPLING, answer, serve
from tests.engine.run.tiny_models import engine_config

CONFIG = engine_config(max_running=6, max_step_tokens=24, prompt_share=1.0)  # prompts are chunked, and their chunks come beside decodes
KINDS = [kind for kind in [*PLAIN, *SAMPLING] if kind.logprobs is None]


class Watched(Ahead):
    """Counts the steps whose sampling was replayed although the model was launched."""

    def __init__(self, executor: LocalExecutor) -> None:
        super().__init__(executor)
        self.num_launched = self.num_launched_ahead = 0
        mixed_steps = runner_of(executor).mixed_steps
        assert mixed_steps is not None
        begin = mixed_steps.begin

        def watched(plan: StepPlan, began: float) -> AsyncStep | None:
            begun, promised = begin(plan, began), bool((plan.decodes.columns[2] == NO_TOKEN).any())
            self.num_launched += begun is not None
            self.num_launched_ahead += begun is not None and promised
            return begun

        mixed_steps.begin = watched  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def pair(dense_folder: Path) -> Iterator[tuple[LocalExecutor, Watched]]:
    """With so few blocks that sequences are preempted."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_capturable_parts(monkeypatch)
        told, replayed = (open_executor(dense_folder, num_blocks=40, max_running=6, runs_ahead=ahead) for ahead in (False, True))
        capture_steps(replayed, CONFIG, prompts_ahead=True)
        yield told, Watched(replayed)
        told.close()
        replayed.close()


@pytest.mark.parametrize("seed", range(1, 5))
def test_answers_are_those_of_a_rank_that_samples_row_by_row(pair: tuple[LocalExecutor, Watched], seed: int) -> None:
    """With penalties, biases and stop ids, chunked prompts, and preemption."""
    told, ahead = pair
    draw, num_launched, num_ahead = random.Random(seed), ahead.num_launched, ahead.num_launched_ahead
    requests = [
        Request(id=str(number), prompt=draw.choice(PROMPTS)[: draw.choice([1, 5, 99])], sampling=replace(draw.choice(KINDS), seed=number))
        for number in range(12)
    ]
    wanted = serve(engine_over(told, CONFIG), requests)
    ahead.submit(StepPlan(0, (), closed=tuple(range(1000)))).result()
    found = serve(Engine(ahead, CONFIG), requests)
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    assert ahead.num_launched > num_launched
    assert ahead.num_launched_ahead > num_ahead


def test_a_step_that_needs_the_host_is_not_launched_ahead(pair: tuple[LocalExecutor, Watched]) -> None:
    ahead = pair[1]
    before = ahead.num_launched
    for sampling in (SamplingParams(logprobs=2, temperature=0.0), SamplingParams(prompt_logprobs=1, temperature=0.0)):
        requests = [Request(id="r", prompt=PROMPTS[0][:9], sampling=replace(sampling, max_tokens=1))]
        ahead.submit(StepPlan(0, (), closed=tuple(range(1000)))).result()
        (events,) = serve(Engine(ahead, CONFIG), requests).values()
        assert events[-1].finish_reason == "length"
    assert ahead.num_launched == before


@pytest.mark.parametrize("kind", ["mean", "first", "last"])
def test_an_embedding_gets_all_parts_of_its_prompt_in_mixed_steps(
    pair: tuple[LocalExecutor, Watched], kind: Literal["mean", "first", "last"]
) -> None:
    """A chunk that is not the last asks for nothing itself."""
    told, ahead = pair
    stream = Request(id="stream", prompt=PROMPTS[0][:4], sampling=SamplingParams(temperature=0.0, max_tokens=12))
    embedding = Request(id="embedding", prompt=tuple(range(5, 65)), sampling=SamplingParams(), pooling=Pooling(kind=kind))

    def vector(engine: Engine) -> bytes | None:
        engine.submit(stream)
        engine.turn()
        engine.submit(embedding)
        found = [event for _ in range(16) for event in engine.turn()]
        assert sum(event.finish_reason is not None for event in found) == 2
        return next(event.embedding for event in found if event.request_id == "embedding" and event.finish_reason)

    wanted = vector(engine_over(told, CONFIG))
    ahead.submit(StepPlan(0, (), closed=tuple(range(1000)))).result()
    assert wanted is not None
    assert vector(Engine(ahead, CONFIG)) == wanted


def test_mixed_steps_are_off_by_default(pair: tuple[LocalExecutor, Watched]) -> None:
    ahead = pair[1]
    runner, before = runner_of(ahead._executor), ahead.num_launched
    assert not RunnerConfig().prompts_ahead
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "mixed_steps", None)
        ahead.submit(StepPlan(0, (), closed=tuple(range(1000)))).result()
        serve(Engine(ahead, CONFIG), [Request(id="r", prompt=PROMPTS[0][:9], sampling=SamplingParams(temperature=0.0, max_tokens=3))])
    assert ahead.num_launched == before


def test_nan_logits_of_a_prompt_fail_only_that_request(pair: tuple[LocalExecutor, Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    told, ahead = pair
    runner = runner_of(ahead._executor)
    plain = [Request(id=str(number), prompt=PROMPTS[number][:5], sampling=PLAIN[0]) for number in range(3)]
    wanted = serve(engine_over(told, CONFIG), plain)
    ahead.submit(StepPlan(0, (), closed=tuple(range(1000)))).result()
    logits, num_calls = runner.model.logits, 0

    def poisoned(hidden_RD: object, sought: object = None) -> object:
        nonlocal num_calls
        num_calls += 1
        found = logits(hidden_RD, sought)  # type: ignore[arg-type]
        if num_calls == 1:
            found[1] = float("nan")
        return found

    monkeypatch.setattr(runner.model, "logits", poisoned)
    found = serve(Engine(ahead, CONFIG), plain)
    assert [events[-1].finish_reason for events in found.values()].count("error") == 1
    assert all(answer(events) == answer(wanted[key]) for key, events in found.items() if events[-1].finish_reason != "error")


def test_works_that_need_more_than_tokens_are_not_a_mixed_batch() -> None:
    plain = Work(1, 0, (4, 5), (0,), samples=True)
    opened = (NewSequence(1, 0, 2, PLAIN[0]),)
    rows = mixed_batch(StepPlan(0, (plain, Work(2, 0, (4,), (1,), samples=False)), opened), 0)
    assert rows is not None
    assert rows.sampling.columns.T.tolist() == [[1, 1, 5, -1]]
    assert rows.non_sampling == [2]
    for special in (plain._replace(targets=(5,)), plain._replace(pools=True, samples=False), plain._replace(num_draft=1)):
        assert mixed_batch(StepPlan(0, (special,), opened), 0) is None
    assert mixed_batch(StepPlan(0, (plain._replace(samples=False),), opened), 0) is None
    assert mixed_batch(StepPlan(0, (plain._replace(shard=1),), opened), 0) is None
