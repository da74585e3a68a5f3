"""Floors, against figures that were worked out apart from this code."""

import dataclasses

import pytest

from parallel.topology import Topology
from serve.planning.floors import Floors, Replica, floors
from serve.planning.formats import BF16, FP8, Format
from serve.planning.hardware import GPUS
from serve.planning.memory import Workload, memory_of_rank
from serve.planning.released_models import SIZES

H200 = GPUS["H200-141G"]
WORK = Workload(context_tokens=1000, concurrency=1, step_tokens=2048)


def floors_of(size: str, running: int, topology: Topology | None = None, format: Format = BF16, work: Workload = WORK) -> Floors:
    topology = topology or Topology()
    shape = SIZES[size]
    ranks = [
        memory_of_rank(shape, topology, rank, format=format, gpu_bytes=H200.memory_bytes, workload=work, running=running)
        for rank in range(topology.size)
    ]
    assert H200.speed is not None
    link = H200.speed.link
    replica = Replica(
        shape=shape, format=format, topology=topology, ranks=ranks, speed=H200.speed, stage_link=link, next_stage_link=link
    )  # fmt: skip
    return floors(replica, work, running)


@pytest.mark.parametrize(
    ("size", "format", "milliseconds"),
    [
        ("0.5B", BF16, (0.22, 0.24, 0.30, 0.56)),
        ("1.5B", BF16, (0.68, 0.72, 0.88, 1.49)),
        ("7B", BF16, (3.09, 3.18, 3.48, 4.71)),
        ("57B-A14B", BF16, (5.97, 17.5, 24.8, 26.4)),
        ("72B", FP8, (15.9, 16.4, 18.1, 25.1)),
    ],
)
def test_one_h200_cannot_decode_faster_than_was_worked_out_by_hand(size: str, format: Format, milliseconds: tuple[float, ...]) -> None:
    """4.6 TB/s, 780 TFLOP/s, context 1,000, batches of 1, 8, 32 and 128."""
    for running, expected in zip((1, 8, 32, 128), milliseconds, strict=True):
        assert floors_of(size, running, format=format).token_s * 1e3 == pytest.approx(expected, rel=0.025, abs=0.005)


def test_a_few_tokens_use_few_experts_and_many_use_all() -> None:
    moe = SIZES["57B-A14B"].moe
    assert moe is not None
    assert [round(moe.distinct_experts(tokens)) for tokens in (1, 2, 8, 16, 32)] == [8, 15, 42, 56, 63]
    assert moe.distinct_experts(10_000) == pytest.approx(64)


def test_eight_ranks_decode_faster_than_four_and_slower_than_eight_times_one() -> None:
    one, four, eight = (floors_of("72B", 16, Topology(tp=tp)) for tp in (1, 4, 8))
    assert eight.token_s < four.token_s < one.token_s
    assert eight.token_s > one.token_s / 8


def test_a_long_prompt_costs_more_than_in_proportion() -> None:
    short, long = (
        floors_of("7B", 1, work=dataclasses.replace(WORK, context_tokens=tokens)).first_token_s for tokens in (4_096, 65_536)
    )  # fmt: skip
    assert long > 16 * short


def test_a_prompt_takes_its_products_and_its_attention() -> None:
    """Qwen2-7B's 6.53 G weights of layers, 28 layers of 3,584 features of queries."""
    tokens = 16_384
    products = 2 * 6.525e9 * tokens + 2 * 28 * 3_584 * tokens**2
    assert floors_of("7B", 1, work=dataclasses.replace(WORK, context_tokens=tokens)).first_token_s == pytest.approx(
        products / 780e12, rel=0.01
    )


def test_four_stages_serve_four_times_the_sequences_at_the_same_pace_and_a_lone_one_no_faster() -> None:
    lone, piped = floors_of("72B", 1), floors_of("72B", 1, Topology(pp=4))
    assert piped.token_s == pytest.approx(lone.token_s, rel=0.02)
    assert floors_of("72B", 256, Topology(pp=4)).tokens_per_s == pytest.approx(4 * floors_of("72B", 64).tokens_per_s, rel=0.05)


def test_stages_share_a_prompt_of_many_chunks() -> None:
    work = dataclasses.replace(WORK, context_tokens=32_768, step_tokens=1024)
    assert floors_of("72B", 1, Topology(pp=4), work=work).first_token_s < floors_of("72B", 1, work=work).first_token_s / 3
