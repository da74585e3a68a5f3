"""Moving experts between running ranks changes no answer.

The sum over ranks is computed in another order afterwards, so the last bits may differ; the greedy tokens do not.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.plan import RebalanceResult, TokenEvent
from engine.request import Request, SamplingParams
from engine.run.process_executor import ProcessExecutor
from engine.run.settings import DispatchChoice
from parallel.topology import Topology
from tests.engine.run.test_end_to_end import PROMPTS, answer, serve
from tests.engine.run.tiny_models import engine_config, float32_config, greedy, write_moe

COUNT = 12
NUM_EXPERTS = 8
REQUESTS = [Request(id=str(i), prompt=p, sampling=SamplingParams(temperature=0.0, max_tokens=COUNT)) for i, p in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moe(tmp_path_factory.mktemp("eight experts"), num_experts=NUM_EXPERTS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[int, ...]]:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", experts_implementation="eager").eval()
    return [greedy(oracle, prompt, COUNT) for prompt in PROMPTS]


IN_STAGES = (Topology(pp=2, tp=2, ep=2), "auto", 1)
IN_SHARDS = (Topology(dp=2, ep=2), "all_to_all", 1)
LAYOUTS = [
    (Topology(tp=2, ep=2), "local", 0),
    (Topology(tp=2, ep=2), "all_to_all", 1),
    (Topology(tp=4, ep=4), "local", 1),
    (Topology(tp=4, ep=4), "all_to_all", 0),
    pytest.param(IN_STAGES, marks=pytest.mark.slow),
    pytest.param(IN_SHARDS, marks=pytest.mark.slow),
]


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{layout[0]}, {layout[1]}, {layout[2]} redundant")
def executor(request: pytest.FixtureRequest, folder: Path) -> Iterator[ProcessExecutor]:
    topology, dispatch, redundant = request.param
    ranks = open_ranks(folder, topology, dispatch, redundant)
    yield ranks
    ranks.close()


def open_ranks(folder: Path, topology: Topology, dispatch: DispatchChoice, redundant: int) -> ProcessExecutor:
    return ProcessExecutor(
        checkpoint_folder=folder,
        topology=topology,
        runner_config=float32_config(num_blocks=400, block_tokens=4, dispatch=dispatch, redundant_experts=redundant),
        engine_config=engine_config(),
    )


def test_moving_experts_changes_no_answer(executor: ProcessExecutor, expected: list[tuple[int, ...]]) -> None:
    engine = Engine(executor, engine_config(max_step_tokens=16))
    check_loads(engine)
    num_moved = []
    for _ in range(2):
        found, moves = serve_moving(engine)
        assert found == expected
        num_moved += moves
    assert sum(count > 0 for count in num_moved) >= 3, "nothing moved while sequences were running"
    assert engine.stats.expert_moves == sum(num_moved)
    assert engine.stats.num_losses == 0
    check_fading(engine)


def check_loads(engine: Engine) -> None:
    """Every token counts once for each expert that it is sent to, and the warm-up does not count. Measuring alone moves nothing."""
    serve(engine, REQUESTS[:3])
    found = rebalance(engine, threshold=float("inf"))
    assert found.num_moved == 0
    assert all(len(loads) == NUM_EXPERTS for loads in found.loads)
    first, last = (sum(loads) for loads in found.loads)
    assert first == 2 * engine.stats.computed_tokens  # two experts per token
    assert 0 < last < first  # of a prompt only the last token has an MLP after the last attention


def serve_moving(engine: Engine) -> tuple[list[tuple[int, ...]], list[int]]:
    """The answers, with experts moved at every second step, and how many were moved each time."""
    heard: list[TokenEvent] = []
    moves = []
    for request in REQUESTS:
        engine.submit(request)
    while not moves or engine.scheduler.num_requests:
        heard += engine.turn()
        heard += engine.turn()
        moves.append(rebalance(engine, heard=heard).num_moved)
    return [answer([event for event in heard if event.request_id == request.id]) for request in REQUESTS], moves


def check_fading(engine: Engine) -> None:
    """Loads count half when they are measured again, and the second time nothing is left to do."""
    first, second = rebalance(engine), rebalance(engine)
    assert second.loads == tuple(tuple(load / 2 for load in loads) for loads in first.loads)
    assert 1.0 <= first.imbalance_after <= first.imbalance_before
    assert second.num_moved == 0
    assert second.imbalance_before == pytest.approx(first.imbalance_after)


def rebalance(engine: Engine, threshold: float = 1.0, heard: list[TokenEvent] | None = None) -> RebalanceResult:
    """``heard`` gets the results of the steps that were in flight."""
    future = engine.rebalance_experts(threshold)
    while not future.done():
        events = engine.turn()
        if heard is not None:
            heard += events
    return future.result(0)
