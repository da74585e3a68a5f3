"""Steps with prompts that are replayed piecewise, against the same steps launched."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.plan import NewSequence, StepPlan, Work
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.run.prompt_graphs import SIZES, PromptGraphs, capture_sizes, prompt_obstacle
from engine.run.runner import Runner
from parallel.native.screened import TopLogits
from tests.engine.run.capturable_ranks import capture_steps, engine_over, open_executor, runner_of, use_capturable_parts
from tests.engine.run.test_end_to_end import PROMPTS, answer, serve
from tests.engine.run.tiny_models import engine_config
from tests.fakes.graphs import RecordedGraphs

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
BLOCKS = 60


@pytest.fixture
def executor(dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalExecutor]:
    use_capturable_parts(monkeypatch)
    executor = open_executor(dense_folder, num_blocks=BLOCKS)
    yield executor
    executor.close()


def have_prompts_replayed(executor: LocalExecutor, sizes: tuple[int, ...]) -> RecordedGraphs:
    """Only piecewise graphs: decodes are launched unless they fit in here."""
    runner, graphs = runner_of(executor), RecordedGraphs()
    runner.forward.prompt_graphs = PromptGraphs(runner.model, runner.cache, graphs, sizes=sizes)
    runner.forward.prompt_graphs.capture()
    return graphs


def hidden_and_kv(executor: LocalExecutor, plans: list[StepPlan]) -> list[torch.Tensor]:
    """The model's logits for the rows that sample, step by step, and its KV cache."""
    runner, seen = runner_of(executor), list[torch.Tensor]()
    logits = runner.model.logits

    def watched(hidden_RD: torch.Tensor, sought: TopLogits | None = None) -> torch.Tensor:
        seen.append(hidden_RD.clone())
        return logits(hidden_RD, sought)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner.model, "logits", watched)
        for plan in plans:
            runner.run(plan)
    runner.run(StepPlan(0, (), closed=tuple(opening.sequence for plan in plans for opening in plan.opened)))
    return [*seen, *(cache.clone() for cache in (*runner.cache.keys_NBGK, *runner.cache.values_NBGK))]


def empty(runner: Runner) -> None:
    for cache in (*runner.cache.keys_NBGK, *runner.cache.values_NBGK):
        cache.zero_()


def steps(block_tokens: int) -> list[StepPlan]:
    """Prompts of several lengths, one of them in two chunks, then decodes beside the rest of a prompt."""
    lengths, begun = (1, 7, 12, 9), (1, 7, 5, 9)
    first = [
        Work(n, 0, tuple(range(n, n + some)), tuple(range(5 * n, 5 * n + -(-(length + 1) // block_tokens))), samples=some == length)
        for n, (length, some) in enumerate(zip(lengths, begun, strict=True))
    ]
    second = [Work(n, length, (3 + n,), (), samples=True) for n, length in enumerate(lengths) if n != 2]
    rest = Work(2, 5, tuple(range(40, 47)), (), samples=True)
    openings = tuple(NewSequence(n, 0, length, GREEDY) for n, length in enumerate(lengths))
    return [StepPlan(0, tuple(first), openings), StepPlan(1, (*second, rest))]


@pytest.mark.parametrize("sizes", [(22,), (32,), (10, 16, 24), (4, 8)])
def test_a_replayed_step_returns_and_caches_what_a_launched_one_does(executor: LocalExecutor, sizes: tuple[int, ...]) -> None:
    runner = runner_of(executor)
    plans = steps(runner.capacity.block_tokens)
    empty(runner)
    wanted = hidden_and_kv(executor, plans)
    empty(runner)
    graphs = have_prompts_replayed(executor, sizes)
    for cache in (*runner.cache.keys_NBGK, *runner.cache.values_NBGK):
        assert not cache.any(), "what is captured writes nowhere"
    found = hidden_and_kv(executor, plans)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    pieces = len(runner.model.layers) + 1
    assert graphs.num_replays == pieces * sum(sizes[-1] >= plan.num_tokens for plan in plans)


@pytest.mark.parametrize("changes", [{}, {"speculate": "ngram"}, {"max_step_tokens": 7, "prefix_cache": True}])
def test_requests_are_answered_as_without_graphs(executor: LocalExecutor, changes: dict[str, object]) -> None:
    config = engine_config(**changes)
    scored = SamplingParams(temperature=0.0, max_tokens=6, prompt_logprobs=2)
    requests = [
        Request(id=str(n), prompt=prompt, sampling=scored if n == 1 else GREEDY) for n, prompt in enumerate((*PROMPTS, PROMPTS[0] * 3))
    ]
    wanted = serve(Engine(executor, config), requests)
    executor.submit(StepPlan(0, (), closed=tuple(range(100)))).result()
    graphs = have_prompts_replayed(executor, (8, 64))
    found = serve(Engine(executor, config), requests)
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    assert graphs.num_replays > 0


@pytest.mark.parametrize("kind", ["dense", pytest.param("moe", marks=pytest.mark.slow)])
def test_they_are_captured_in_addition_to_decode_graphs(kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_capturable_parts(monkeypatch)
    config = engine_config()
    requests = [Request(id=str(n), prompt=prompt, sampling=GREEDY) for n, prompt in enumerate(PROMPTS)]
    executor = open_executor(request.getfixturevalue(f"{kind}_folder"), num_blocks=BLOCKS)
    wanted = serve(Engine(executor, config), requests)
    executor.submit(StepPlan(0, (), closed=tuple(range(100)))).result()
    without = capture_steps(executor, config)
    serve(engine_over(executor, config), requests)
    executor.submit(StepPlan(0, (), closed=tuple(range(100)))).result()
    graphs = capture_steps(executor, config, prompts=True)
    found = serve(engine_over(executor, config), requests)
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    assert graphs.num_replays > without.num_replays
    runner = runner_of(executor)
    executor.close()
    assert runner.forward.prompt_graphs is None


def test_obstacles_are_attention_that_cannot_be_split_out_and_counted_experts(
    executor: LocalExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runner_of(executor).model
    assert prompt_obstacle(model) is None
    monkeypatch.setattr(model.backend, "supports_graph_breaks", False, raising=False)
    assert prompt_obstacle(model) == "attention by CapturableAttention cannot be split out of a captured step"


@pytest.mark.parametrize("most_tokens", [1, 16, 64, 65, 512, 1000, 1024, 8192])
def test_sizes_end_with_the_longest_step(most_tokens: int) -> None:
    sizes = capture_sizes(most_tokens)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == min(most_tokens, SIZES[-1])
