"""`manta bench`: what is counted, and what it is held against."""

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from parallel.onednn_format import OneDnnFormat
from parallel.packed_format import PackedFormat
from parallel.quantised_format import QuantisedFormat
from parallel.weight_format import Dense
from serve.bench.ceiling import Ceiling
from serve.bench.control_plane import control_plane_s
from serve.bench.report import WeightBytes, floor_s, summarise
from serve.bench.weights import format_name
from serve.bench.workload import Workload, run_workload
from tests.fakes.executor import FakeExecutor

CELL = Workload(name="tiny", streams=3, tokens_in=8, tokens_out=4, shared_prefix=4)
WEIGHTS = WeightBytes(per_step=100, multiply_adds_per_prompt_token=30, multiply_adds_per_token=50)


def test_a_round_counts_every_token_of_every_request():
    engine = Engine(FakeExecutor(num_blocks=64), EngineConfig(block_tokens=4))
    result = run_workload(engine, CELL, vocab_size=1000, seed=1)
    assert result.prompt_tokens == 3 * (4 + 8)
    assert result.output_tokens == 3 * 4
    assert result.elapsed_s >= result.ttft_s > 0


def test_prompts_share_their_prefix_and_are_new_in_every_round():
    first, second = CELL.prompts(1000, seed=1), CELL.prompts(1000, seed=2)
    assert len({prompt[:4] for prompt in first}) == 1
    assert len(set(first)) == 3
    assert not set(first) & set(second)


def test_the_floor_is_reading_the_weights_or_multiplying_whichever_takes_longer():
    reading = Ceiling(read_bytes_per_s=100, flop_per_s=1e9)
    multiplying = Ceiling(read_bytes_per_s=1e9, flop_per_s=100)
    assert round(floor_s(CELL, WEIGHTS, reading), 3) == 4.0
    assert round(floor_s(CELL, WEIGHTS, multiplying), 3) == (4 + 3 * 7) * 0.6 + 3 + 3 * 3


def test_a_figure_is_the_median_of_its_rounds():
    engine = Engine(FakeExecutor(num_blocks=64), EngineConfig(block_tokens=4))
    rounds = [run_workload(engine, CELL, vocab_size=1000, seed=seed) for seed in range(3)]
    figure = summarise(CELL, rounds, WEIGHTS, Ceiling(read_bytes_per_s=1e9, flop_per_s=1e9))
    assert figure.tokens_per_s == sorted(12 / each.elapsed_s for each in rounds)[1]


def test_the_cost_of_deciding_is_measured_with_every_sequence_decoding():
    assert control_plane_s(sequences=8, steps=3) >= 0


@pytest.mark.parametrize(
    ("format", "name"),
    [
        (Dense(torch.float32), "float32"),
        (PackedFormat("bf16_dot", torch.bfloat16), "bf16_dot"),
        (QuantisedFormat("int8", torch.bfloat16), "int8"),
        (OneDnnFormat(torch.bfloat16), "bfloat16"),
    ],
)
def test_a_format_is_named_in_a_word(format, name: str) -> None:
    assert format_name(format) == name
