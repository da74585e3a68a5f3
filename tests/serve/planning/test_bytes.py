"""The planner's bytes are those that loading allocates."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.run.memory import CUDA_FRACTION
from model.config import ModelConfig
from model.formats import Formats
from model.kv_cache import KvCache
from parallel.axes import whole
from parallel.quantised_format import QuantisedFormat
from parallel.topology import Topology
from parallel.weight_format import Dense
from serve.planning.formats import BF16, FORMATS, STORED_INT4, STORED_INT4_ZEROS, STORED_INT8, STORED_QUANTISED, Format
from serve.planning.memory import USABLE_FRACTION, kv_bytes_per_token
from serve.planning.released_models import SIZES
from serve.planning.shape import ModelShape, shape_of_checkpoint, shape_of_config
from serve.planning.weights import weights_of_rank
from tests.model.oracle import make_oracle
from tests.model.quantise_checkpoint import AWQ, GPTQ, store_quantised
from tests.serve.planning.allocated import BLOCK_TOKENS, allocate, load, tensor_bytes, write_checkpoint_of
from tests.serve.planning.plan_inputs import CONFIGS, config, moe

TOLERANCE = 0.02
COUNTERS = 1e-5
"""A few counters hang in a model beside its weights. One KV head of one layer would be more."""


def planned_bytes(shape: ModelShape, topology: Topology, rank: int, format: Format = BF16) -> int:
    return weights_of_rank(shape, topology, topology.coordinates(rank), format).num_bytes


@pytest.mark.parametrize("name", ["0.5B", "1.5B", "tiny", "tiny_moe", "every_other_layer"])
@pytest.mark.parametrize("tp", [1, 2, 3])
def test_planned_weights_are_those_that_a_rank_loads(name: str, tp: int, tmp_path: Path) -> None:
    folder, shape = write_checkpoint_of(tmp_path, CONFIGS[name]), shape_of_config(CONFIGS[name], name=name)
    for rank in range(tp):
        loaded = tensor_bytes(load(folder, Topology(tp=tp), rank))
        assert planned_bytes(shape, Topology(tp=tp), rank) == pytest.approx(loaded, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["0.5B", "tiny", "tiny_moe"])
@pytest.mark.parametrize("format", [FORMATS["int8"], FORMATS["int4"], FORMATS["fp8"]], ids=lambda format: str(format.name))
def test_planned_rounded_weights_are_those_that_a_rank_of_a_gpu_holds(name: str, format: Format, tmp_path: Path) -> None:
    folder, shape = write_checkpoint_of(tmp_path, CONFIGS[name]), shape_of_config(CONFIGS[name], name=name)
    assert format.quantize is not None
    table = Dense(torch.bfloat16) if format.table is None else QuantisedFormat("int8", torch.bfloat16)
    formats = Formats(QuantisedFormat(format.quantize, torch.bfloat16), table)
    for rank in range(2):
        loaded = tensor_bytes(load(folder, Topology(tp=2), rank, formats))
        assert planned_bytes(shape, Topology(tp=2), rank, format) == pytest.approx(loaded, rel=TOLERANCE)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "topology",
    [Topology(tp=3), Topology(tp=4, dp=2, ep=8), Topology(tp=2, dp=3, ep=2, pp=3)],
    ids=str,
)
def test_at_full_size_a_rank_would_allocate_what_is_planned_to_the_last_head(size: str, topology: Topology) -> None:
    shape = SIZES[size]
    for rank in {topology.tp - 1, topology.size - 1}:
        model = allocate(ModelConfig.from_dict(as_config(shape)), topology, rank)
        assert planned_bytes(shape, topology, rank) == pytest.approx(tensor_bytes(model), rel=COUNTERS)
        assert kv_bytes_per_token(shape, topology, topology.coordinates(rank)) * BLOCK_TOKENS == model.kv_layout.bytes_per_block


@pytest.mark.parametrize("redundant", [1, 3, 70])
@pytest.mark.parametrize("topology", [Topology(tp=4, dp=4, ep=16), Topology(tp=3, ep=3), Topology(tp=2)], ids=str)
def test_a_rank_would_allocate_the_planned_room_for_experts_that_are_held_twice(topology: Topology, redundant: int) -> None:
    shape = SIZES["57B-A14B"]
    for rank in (0, topology.size - 1):
        model = allocate(ModelConfig.from_dict(as_config(shape)), topology, rank, redundant_experts=redundant)
        planned = weights_of_rank(shape, topology, topology.coordinates(rank), BF16, redundant_experts=redundant)
        assert planned.num_bytes == pytest.approx(tensor_bytes(model), rel=COUNTERS)


@pytest.mark.parametrize("topology", [Topology(tp=2), Topology(tp=3, pp=2), Topology(tp=8)], ids=str)
def test_a_planned_token_of_kv_is_a_token_of_the_cache(topology: Topology) -> None:
    shape = shape_of_config(CONFIGS["tiny"], name="tiny")
    for rank in range(topology.size):
        layout = allocate(ModelConfig.from_dict(CONFIGS["tiny"]), topology, rank).kv_layout
        cache = KvCache(layout, 5, torch.device("cpu"))
        held = sum(tensor.nbytes for tensor in (*cache.keys_NBGK, *cache.values_NBGK))
        assert kv_bytes_per_token(shape, topology, topology.coordinates(rank)) * 5 * BLOCK_TOKENS == held
        in_fp8 = KvCache(dataclasses.replace(layout, dtype=torch.float8_e4m3fn), 5, torch.device("cpu"))
        held = sum(tensor.nbytes for tensor in (*in_fp8.keys_NBGK, *in_fp8.values_NBGK))
        assert kv_bytes_per_token(shape, topology, topology.coordinates(rank), 1) * 5 * BLOCK_TOKENS == held


def test_as_much_of_a_gpu_is_planned_as_the_engine_takes() -> None:
    assert USABLE_FRACTION == CUDA_FRACTION


@st.composite
def shapes_and_topologies(draw: st.DrawFn) -> tuple[ModelShape, Topology]:
    group, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    heads = group * kv_heads
    numbers = functools.partial(st.integers, 1)
    raw = config(
        heads, kv_heads, draw(numbers(9)) * 8, draw(numbers(70)), draw(numbers(90)), draw(numbers(5)), head_dim=2 * draw(numbers(4)),
        tie_word_embeddings=draw(st.booleans()),
    )  # fmt: skip
    if draw(st.booleans()):
        experts = draw(numbers(9))
        raw |= moe(experts, draw(numbers(experts)), draw(numbers(20)), draw(numbers(20))) | {"decoder_sparse_step": draw(numbers(3))}
    topology = Topology(tp=draw(st.integers(1, heads)), dp=draw(numbers(3)), pp=draw(st.integers(1, raw["num_hidden_layers"])))  # type: ignore[arg-type]
    ep = draw(st.sampled_from([ep for ep in range(1, topology.ranks_per_stage + 1) if topology.ranks_per_stage % ep == 0]))
    return shape_of_config(raw, name="any"), Topology(tp=topology.tp, dp=topology.dp, pp=topology.pp, ep=ep)


@settings(deadline=None)
@given(asked=shapes_and_topologies())
def test_all_ranks_together_hold_the_model_once_and_what_is_copied_again(asked: tuple[ModelShape, Topology]) -> None:
    shape, topology = asked
    model = planned_bytes(shape, Topology(), 0)
    together = sum(planned_bytes(shape, topology, rank) for rank in range(topology.size))
    assert together == model + copied_bytes(shape, topology)
    assert together >= model


def copied_bytes(shape: ModelShape, topology: Topology) -> int:
    """What more than one rank holds, said another way than the planner does: copies beyond the first of each stored row."""
    group = shape.num_heads // shape.num_kv_heads
    kv_head_rows = 2 * shape.head_dim * (shape.hidden_size + (1 if shape.qkv_bias else 0))
    holders = 0
    first = 0
    for rank in range(topology.tp):
        last = -(-(rank + 1) * shape.num_heads // topology.tp) - 1
        holders += last // group - first // group + 1
        first = last + 1
    per_layer_of_tp_group = (holders - shape.num_kv_heads) * kv_head_rows + (topology.tp - 1) * 2 * shape.hidden_size
    sparse = sum(map(shape.is_sparse, range(shape.num_layers)))
    per_sparse = (topology.tp - 1) * (shape.moe.num_experts + 1) * shape.hidden_size if shape.moe else 0
    within = shape.num_layers * per_layer_of_tp_group + sparse * per_sparse + (topology.tp - 1) * shape.hidden_size
    second_head = shape.vocab_size * shape.hidden_size if shape.tied_embeddings and topology.pp > 1 else 0
    one_group = within + second_head
    return 2 * (one_group * topology.dp + (topology.dp - 1) * (all_but_routed(shape)))


def all_but_routed(shape: ModelShape) -> int:
    """Weights that every dp copy of a stage holds for itself."""
    held = weights_of_rank(shape, Topology(), Topology().coordinates(0), BF16)
    return (held.num_bytes - held.routed.num_bytes) // 2


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 16), ("fp8", 8), ("int8", 8)])
def test_a_format_takes_its_bits_and_a_little_for_scales(name: str, bits: int) -> None:
    weights = 4096 * 4096
    held = FORMATS[name].matrix_bytes(4096, whole(4096))
    assert weights * bits / 8 <= held <= weights * bits / 8 * 1.05


@pytest.mark.parametrize(
    ("config", "format", "tp"),
    [(GPTQ, STORED_INT4, 2), (AWQ, STORED_INT4_ZEROS, 1), (AWQ | {"group_size": 64}, STORED_INT8, 2)],
    ids=["gptq", "awq", "awq 64"],
)
@pytest.mark.parametrize("name", ["grouped", "grouped_moe"])
def test_planned_weights_of_a_quantised_checkpoint_are_those_that_a_rank_of_a_gpu_holds(
    name: str, config: dict[str, Any], format: Format, tp: int, tmp_path: Path
) -> None:
    source = make_oracle(name, tmp_path / "source", dtype=torch.bfloat16).folder
    store_quantised(source, tmp_path / "stored", tmp_path / "plain", config)
    shape = shape_of_checkpoint(tmp_path / "stored", name=name)
    assert shape.format is format
    (kind,) = (kind for kind, known in STORED_QUANTISED.items() if known is format)
    formats = Formats(QuantisedFormat(kind, torch.float32), Dense(torch.bfloat16))
    for rank in range(tp):
        loaded = tensor_bytes(load(tmp_path / "stored", Topology(tp=tp), rank, formats))
        assert planned_bytes(shape, Topology(tp=tp), rank, format) == pytest.approx(loaded, rel=TOLERANCE)


def test_where_ranks_cut_within_its_groups_a_quantised_checkpoint_is_planned_in_eight_bits() -> None:
    shape = SIZES["7B"]
    for topology, held in ((Topology(tp=4), STORED_INT4_ZEROS), (Topology(tp=8), STORED_INT8)):
        assert planned_bytes(shape, topology, 1, STORED_INT4_ZEROS) == planned_bytes(shape, topology, 1, held)
    assert planned_bytes(shape, Topology(tp=4), 1, STORED_INT4_ZEROS) < 0.65 * planned_bytes(shape, Topology(tp=4), 1, STORED_INT8)


def as_config(shape: ModelShape) -> dict[str, object]:
    raw = config(
        shape.num_heads, shape.num_kv_heads, shape.hidden_size, shape.intermediate_size, shape.vocab_size, shape.num_layers,
        tie_word_embeddings=shape.tied_embeddings,
    )  # fmt: skip
    if shape.moe is not None:
        part = shape.moe
        raw |= moe(part.num_experts, part.experts_per_token, part.expert_intermediate_size, part.shared_intermediate_size)
    return raw
