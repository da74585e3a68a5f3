"""The model against transformers, on one rank and split over several."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.dispatch import DispatchName
from parallel.topology import Topology
from tests.model.driver import NUM_GREEDY, Answers, answers, last_logits, logits_of, own_prompts, seeded_prompts
from tests.model.oracle import Oracle, make_oracle
from tests.ranks import run_ranks

LENGTHS = (5, 1, 40, 17)
TOLERANCE = 1e-4

MakeOracle = Callable[[str], Oracle]


@cache
def greedy_of(oracle: Oracle, prompt: tuple[int, ...]) -> list[int]:
    return oracle.greedy(prompt, NUM_GREEDY)


def assert_equal_to(oracle: Oracle, per_rank: Sequence[Answers], prompts: Sequence[list[int]]) -> None:
    """Every rank's answers, computed in each way, are the oracle's."""
    wanted = [oracle.logits(prompt) for prompt in prompts]
    wanted_greedy = [greedy_of(oracle, tuple(prompt)) for prompt in prompts]
    for found in per_rank:
        for way in ("whole", "chunked", "mixed"):
            for logits, expected in zip(getattr(found, way), wanted, strict=True):
                torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0, msg=lambda text, way=way: f"{way}: {text}")
        if found.greedy:
            assert found.greedy == wanted_greedy


DENSE = ["9_heads", "14_heads_tied", "28_heads"]
SPARSE = ["moe", "moe_renormalised"]


def check(topology: Topology, names: Sequence[str], oracle: MakeOracle, dispatch: DispatchName = "local") -> None:
    oracles = [oracle(name) for name in names]
    prompts = seeded_prompts(min(one.vocab_size for one in oracles), LENGTHS)
    per_rank = run_ranks(topology, answers, [one.folder for one in oracles], prompts, dispatch)
    last_stage = per_rank[-topology.ranks_per_stage :]
    for number, one in enumerate(oracles):
        assert_equal_to(one, [of_rank[number] for of_rank in last_stage], prompts)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_dense_model_answers_as_transformers_however_many_ranks_share_it(ranks: int, oracle: MakeOracle) -> None:
    check(Topology(tp=ranks), DENSE, oracle)


@pytest.mark.parametrize(
    "topology",
    [Topology(), Topology(tp=2), Topology(tp=2, ep=2), Topology(tp=4, ep=4), Topology(tp=4, ep=2)],
    ids=["one rank", "expert-tp 2", "ep 2", "ep 4", "tp 2 x ep 2"],
)
@pytest.mark.parametrize("dispatch", ["local", "all_to_all"])
def test_a_sparse_model_answers_as_transformers_however_its_experts_are_placed(
    topology: Topology, dispatch: DispatchName, oracle: MakeOracle
) -> None:
    check(topology, SPARSE, oracle, dispatch)


@pytest.mark.parametrize("topology", [Topology(pp=2), Topology(pp=3), Topology(pp=2, tp=2)], ids=str)
def test_a_model_in_stages_answers_as_transformers(topology: Topology, oracle: MakeOracle) -> None:
    check(topology, [*DENSE, "moe"], oracle)


@pytest.mark.parametrize("dispatch", ["local", "all_to_all"])
@pytest.mark.parametrize("topology", [Topology(dp=2), Topology(dp=2, ep=2), Topology(dp=2, tp=2, ep=2)], ids=str)
def test_data_parallel_ranks_share_the_experts(topology: Topology, dispatch: DispatchName, oracle: MakeOracle) -> None:
    one = oracle("moe")
    prompts = seeded_prompts(one.vocab_size, [3, 20, 9, 1])
    for rank, found in enumerate(run_ranks(topology, own_prompts, one.folder, prompts, 7, dispatch)):
        dp = topology.coordinates(rank).dp
        for logits, prompt in zip(found, prompts[dp::2], strict=True):
            torch.testing.assert_close(logits, one.logits(prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_logits_are_computed_only_where_they_are_asked_for(ranks: int, oracle: MakeOracle) -> None:
    one = oracle("9_heads")
    (prompt,) = seeded_prompts(one.vocab_size, [23])
    for found in run_ranks(Topology(tp=ranks), last_logits, one.folder, prompt, 10):
        torch.testing.assert_close(found, one.logits(prompt)[-1:], atol=TOLERANCE, rtol=0)


def test_yarn_answers_as_transformers_within_and_beyond_the_trained_context(oracle: MakeOracle) -> None:
    one = oracle("yarn")
    (prompt,) = seeded_prompts(one.vocab_size, [100])
    (found,) = run_ranks(Topology(), logits_of, one.folder, prompt)
    torch.testing.assert_close(found, one.logits(prompt), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["0.5B", "1.5B", "7B"])
def test_a_model_of_released_width_answers_as_transformers_on_one_and_two_ranks(name: str, tmp_path: Path) -> None:
    one = make_oracle(name, tmp_path)
    (prompt,) = seeded_prompts(one.vocab_size, [19])
    wanted = one.logits(prompt)
    for ranks in (1, 2):
        for found in run_ranks(Topology(tp=ranks), logits_of, tmp_path, prompt):
            torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["9_heads", "moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_half_precision_is_as_near_to_the_truth_as_transformers_is(name: str, dtype: torch.dtype, ranks: int, tmp_path: Path) -> None:
    """The expected logits: the same rounded weights, computed in float32.

    By the median over positions: if two experts are almost tied, rounding chooses between them, in both implementations.
    """
    one = make_oracle(name, tmp_path, dtype=dtype)
    (prompt,) = seeded_prompts(one.vocab_size, [24])
    theirs = one.logits(prompt)
    truth = one.truth().logits(prompt)
    for ours in run_ranks(Topology(tp=ranks), logits_of, tmp_path, prompt, dtype):
        assert _error(ours, truth) < 1.5 * _error(theirs, truth) + 1e-4


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).square().mean(-1).sqrt().median())
