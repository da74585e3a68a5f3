"""The real engine on real ranks with every axis of parallelism: the same tokens as transformers, in any batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.engine import Engine
from engine.executor import Capacity, PendingStep
from engine.plan import StepPlan, StepResult, TokenLogprobs
from engine.request import Request, SamplingParams
from engine.run.process_executor import ProcessExecutor
from parallel.topology import Topology
from tests.engine.run.tiny_models import (
    NUM_REAL_TOKENS,
    assert_scored_as,
    engine_config,
    float32_config,
    greedy,
    oracle_logprobs,
    write_dense,
    write_moe,
)

COUNT = 7
NUM_LAYERS = 3
SMALL_POOL = 16
PROMPT_LENGTHS = (1, 3, 5, 17, 33, 40)


def make_prompts() -> list[tuple[int, ...]]:
    """Prompts with lengths around the boundaries of blocks and steps; half of them share a prefix."""
    generator = torch.Generator().manual_seed(11)
    common = torch.randint(0, NUM_REAL_TOKENS, (16,), generator=generator).tolist()
    own = [torch.randint(0, NUM_REAL_TOKENS, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    return [tuple(prompt) for prompt in own] + [tuple(common + prompt[:7]) for prompt in own[1:5]]


PROMPTS = make_prompts()
SCORED = (3, 5, 7)
"""The prompts whose log-probabilities are asked for."""


class Watched:
    """Forwards plans and records them. May report fewer blocks than there are, to force preemption."""

    def __init__(self, executor: ProcessExecutor, num_blocks: int | None) -> None:
        self._executor = executor
        self.capacity: Capacity = executor.capacity
        if num_blocks is not None:
            most = num_blocks * self.capacity.block_tokens
            self.capacity = replace(self.capacity, num_blocks=num_blocks, max_context_tokens=min(most, self.capacity.max_context_tokens))
        self.plans: list[StepPlan] = []
        self.most_in_flight = self._in_flight = 0

    def submit(self, plan: StepPlan) -> PendingStep:
        self.plans.append(plan)
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        pending = self._executor.submit(plan)

        class Pending:
            def result(_self) -> StepResult:  # noqa: N805
                self._in_flight -= 1
                return pending.result()

        return Pending()

    def close(self) -> None:
        """Continue with another engine, whose sequence numbers start at 0 again."""
        opened = tuple(opening.sequence for plan in self.plans for opening in plan.opened)
        self._executor.submit(StepPlan(10**6, (), closed=opened)).result()


@contextmanager
def ranks_of(folder: Path, topology: Topology) -> Iterator[ProcessExecutor]:
    executor = ProcessExecutor(
        checkpoint_folder=folder,
        topology=topology,
        runner_config=float32_config(num_blocks=600, block_tokens=4),
        engine_config=engine_config(),
    )
    try:
        yield executor
    finally:
        executor.close()


def serve(
    executor: ProcessExecutor, *, num_blocks: int | None = None, **changes: object
) -> tuple[list[tuple[int, ...]], dict[int, tuple[TokenLogprobs, ...]], Engine, Watched]:
    """The answers to all prompts, served together; half of them again, with what the first left in the caches."""
    watched = Watched(executor, num_blocks)
    engine = Engine(watched, engine_config(**changes))
    answers: dict[str, list[int]] = {}
    scores: dict[int, tuple[TokenLogprobs, ...]] = {}
    for again in range(2):
        for i, prompt in list(enumerate(PROMPTS))[:: 1 + again]:
            answers[f"{i}-{again}"] = []
            sampling = SamplingParams(temperature=0.0, max_tokens=COUNT, prompt_logprobs=2 if i in SCORED else None)
            engine.submit(Request(id=f"{i}-{again}", prompt=prompt, sampling=sampling))
        while True:
            for event in engine.turn():
                assert event.error_kind is None, event
                answers[event.request_id] += event.tokens
                if event.prompt_logprobs:
                    scores[int(event.request_id.split("-")[0])] = event.prompt_logprobs
            if not engine.scheduler.num_requests:
                break
    assert engine.stats.blocks_used == 0
    watched.close()
    first = [tuple(answers[f"{i}-0"]) for i in range(len(PROMPTS))]
    assert first[::2] == [tuple(answers[f"{i}-1"]) for i in range(0, len(PROMPTS), 2)]
    return first, scores, engine, watched


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return write_moe(tmp_path_factory.mktemp("moe"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def expected(dense, moe) -> dict[str, tuple[list[tuple[int, ...]], dict[int, torch.Tensor]]]:
    answers = {}
    for name, folder in (("dense", dense), ("moe", moe)):
        oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        scores = {index: oracle_logprobs(oracle, PROMPTS[index]) for index in SCORED}
        answers[name] = [greedy(oracle, prompt, COUNT) for prompt in PROMPTS], scores
    return answers


LAYOUTS = [
    ("dense", Topology(pp=2)),
    ("moe", Topology(dp=2, ep=2)),
    ("dense", Topology(dp=2)),
    ("dense", Topology(pp=3)),
    ("dense", Topology(pp=2, tp=2)),
    pytest.param("moe", Topology(pp=2, tp=2, ep=2), marks=pytest.mark.slow),
    pytest.param("moe", Topology(pp=2, dp=2, ep=2), marks=pytest.mark.slow),
    pytest.param("moe", Topology(tp=2, dp=2, ep=4), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("model", "topology"), LAYOUTS, ids=lambda value: str(value).replace(" ", ""))
def test_a_replica_of_any_layout_answers_as_transformers_does(request, expected, model, topology):
    with ranks_of(request.getfixturevalue(model), topology) as executor:
        for changes in (
            {},
            {"prefix_cache": False, "num_blocks": SMALL_POOL},
            {"max_step_tokens": 6, "num_blocks": SMALL_POOL},
        ):
            answers, scores, engine, watched = serve(executor, **changes)
            assert answers == expected[model][0], changes
            assert scores.keys() == set(SCORED)
            for index, told in scores.items():
                assert_scored_as(expected[model][1][index], PROMPTS[index], told)
            assert {work.shard for plan in watched.plans for work in plan.works} == set(range(topology.dp))
            assert watched.most_in_flight == topology.pp
            assert (engine.stats.prefix_hit_tokens > 0) == changes.get("prefix_cache", True)
            assert (engine.stats.num_preemptions > 0) == ("num_blocks" in changes), changes
