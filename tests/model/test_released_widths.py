"""All released widths of Qwen2 and Qwen2.5 against transformers, with every kind of parallelism. Fewer layers and a smaller vocabulary."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.dispatch import DispatchName
from parallel.topology import Topology
from tests.model.driver import follow, seeded_prompts
from tests.model.oracle import SHAPES, Oracle, write_half
from tests.ranks import end_pools, run_ranks

TOLERANCE = 1e-4
NUM_PROMPT, NUM_GREEDY = 17, 5
RANKS_TIMEOUT_S = 1000.0
SETTINGS = SHAPES | {
    "0.5B in stages": SHAPES["0.5B"] | {"num_hidden_layers": 3},
    "1.5B in stages": SHAPES["1.5B"] | {"num_hidden_layers": 3},
    "7B in stages": SHAPES["7B"] | {"num_hidden_layers": 3},
    "57B-A14B in stages": SHAPES["57B-A14B"] | {"num_hidden_layers": 3, "mlp_only_layers": [0, 1]},  # three sparse ones do not fit
    "72B in stages": SHAPES["72B"] | {"num_hidden_layers": 3},
}


@dataclass(frozen=True)
class Case:
    """A checkpoint on disk and transformers' results for it. transformers' model is freed: memory is for the ranks."""

    name: str
    folder: Path
    sequences: list[list[int]]
    """Prompts of `NUM_PROMPT` tokens and their greedy answers."""
    wanted: list[Tensor]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("checkpoint")
    kind = write_half(SETTINGS[request.param], folder)
    gc.collect()
    oracle = Oracle.read(folder, kind, torch.float32)
    prompts = seeded_prompts(oracle.vocab_size, [NUM_PROMPT, NUM_PROMPT])
    sequences = [prompt + oracle.greedy(prompt, NUM_GREEDY) for prompt in prompts]
    wanted = [oracle.logits(tokens) for tokens in sequences]
    del oracle
    gc.collect()
    yield Case(request.param, folder, sequences, wanted)
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture(autouse=True)
def _ranks_end_with_each_layout() -> Iterator[None]:
    yield
    end_pools()


def check(case: Case, topology: Topology, dispatch: DispatchName = "local", redundant_experts: int = 0) -> None:
    found = run_ranks(
        topology,
        follow,
        case.folder,
        case.sequences,
        NUM_PROMPT,
        case.wanted,
        dispatch,
        redundant_experts,
        timeout_s=RANKS_TIMEOUT_S,
    )
    last_stage = found[-topology.ranks_per_stage :]
    print(f"{case.name}, {topology}, {dispatch}, {redundant_experts}: max error {max(one.max_error for one in last_stage):.1e}")
    for rank, one in enumerate(last_stage):
        assert one.max_error < TOLERANCE
        assert one.greedy == [tokens[NUM_PROMPT:] for tokens in case.sequences[topology.coordinates(rank).dp :: topology.dp]]


def sizes(*quick: str, slow: tuple[str, ...]) -> pytest.MarkDecorator:
    """The checkpoints of a test; the slow ones take gigabytes and minutes."""
    marked = [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]) for name in slow]
    return pytest.mark.parametrize("case", [*quick, *marked], indirect=True)


@sizes("0.5B", slow=("1.5B", "3B", "7B", "14B", "32B", "72B"))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_tensor_parallel_ranks_of_any_number_answer_as_transformers(case: Case, ranks: int) -> None:
    check(case, Topology(tp=ranks))


STAGES = [Topology(pp=2), Topology(pp=3), Topology(pp=2, tp=2)]


@sizes(slow=("0.5B in stages", "1.5B in stages", "7B in stages", "57B-A14B in stages", "72B in stages"))
@pytest.mark.parametrize("topology", STAGES, ids=str)
def test_stages_answer_as_transformers(case: Case, topology: Topology) -> None:
    check(case, topology)


@sizes(slow=("57B-A14B in stages",))
@pytest.mark.parametrize("dispatch", ["local", "all_to_all"])
def test_stages_whose_ranks_share_experts_answer_as_transformers(case: Case, dispatch: DispatchName) -> None:
    check(case, Topology(pp=2, tp=2, ep=2), dispatch)


SPARSE = [
    *(Topology(tp=ranks) for ranks in (1, 2, 3, 4, 5, 8)),
    *(Topology(tp=ranks, ep=ranks) for ranks in (2, 4, 8)),
    Topology(dp=2, ep=2),
    Topology(tp=4, ep=2),
    Topology(tp=2, dp=2, ep=4),
]


@sizes(slow=("57B-A14B",))
@pytest.mark.parametrize("topology", SPARSE, ids=str)
def test_64_experts_answer_as_transformers_wherever_they_are(case: Case, topology: Topology) -> None:
    check(case, topology)


@sizes(slow=("57B-A14B",))
@pytest.mark.parametrize("topology", [Topology(tp=4, ep=4), Topology(tp=2, dp=2, ep=4), Topology(tp=8, ep=8)], ids=str)
def test_64_experts_with_all_to_all_answer_as_transformers(case: Case, topology: Topology) -> None:
    check(case, topology, "all_to_all")


@sizes(slow=("57B-A14B",))
@pytest.mark.parametrize("dispatch", ["local", "all_to_all"])
@pytest.mark.parametrize("topology", [Topology(tp=4, ep=4), Topology(tp=2, dp=2, ep=4)], ids=str)
def test_redundant_experts_answer_as_transformers(case: Case, topology: Topology, dispatch: DispatchName) -> None:
    check(case, topology, dispatch, redundant_experts=2)
