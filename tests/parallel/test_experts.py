"""Routed experts over ranks, with either dispatch, against a loop over tokens and against transformers."""

from dataclasses import dataclass
from mmap import mmap
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.arena import Arena
from parallel.dispatch import DispatchName, make_dispatch
from parallel.expert_placement import ExpertPlacement, InvalidPlacement, balanced_placement
from parallel.experts import Expert, RoutedExperts
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.linear import ShapeMismatch
from parallel.native.library import native
from parallel.native.linear import Kind
from parallel.packed_format import PackedFormat
from parallel.topology import Topology
from parallel.weight_format import Dense, WeightFormat
from tests.parallel.memory_tensor import MemoryTensor
from tests.ranks import run_ranks

EXPERTS, HIDDEN, INTERMEDIATE, ACTIVE = 7, 12, 10, 3
TP, TP3 = Topology(tp=2), Topology(tp=3)
TOPOLOGIES = [
    Topology(),
    TP,
    TP3,
    Topology(tp=2, ep=2),
    Topology(tp=3, ep=3),
    Topology(tp=4, ep=4),
    Topology(tp=4, ep=2),
    Topology(dp=2),
    Topology(dp=2, ep=2),
    Topology(tp=2, dp=2),
    Topology(tp=2, dp=2, ep=2),
    Topology(tp=2, dp=2, ep=4),
    Topology(dp=3, ep=3),
    Topology(pp=2, tp=2, ep=2),
]


@dataclass(frozen=True)
class Weights:
    gate: Tensor
    up: Tensor
    down: Tensor


def weights(dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return (torch.randn(EXPERTS, *shape, generator=generator) / 3).to(dtype)

    return Weights(gate=random(INTERMEDIATE, HIDDEN), up=random(INTERMEDIATE, HIDDEN), down=random(HIDDEN, INTERMEDIATE))


def tokens(num_tokens: int, seed: int, dtype: torch.dtype, *, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
    probabilities = torch.rand(num_tokens, experts, generator=generator).softmax(dim=-1)
    chosen, ids = probabilities.topk(ACTIVE, dim=-1)
    return x, ids, chosen.to(dtype)


def loop_over_tokens(w: Weights, x: Tensor, ids: Tensor, chosen: Tensor) -> Tensor:
    """The reference: no sorting, no groups."""
    rows = []
    for row, experts, factors in zip(x, ids.tolist(), chosen, strict=True):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert, factor in zip(experts, factors, strict=True):
            hidden = F.silu(w.gate[expert].double() @ row.double()) * (w.up[expert].double() @ row.double())
            total += factor.double() * (w.down[expert].double() @ hidden)
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros(0, HIDDEN, dtype=torch.float64)


def build(
    groups: ParallelGroups,
    dtype: torch.dtype,
    name: DispatchName = "local",
    placement: ExpertPlacement | None = None,
    format: WeightFormat | None = None,
) -> RoutedExperts:
    placement = placement or balanced_placement(EXPERTS, groups.ep.size)
    layer = RoutedExperts(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        groups=groups,
        format=format or Dense(dtype),
        placement=placement,
        dispatch=make_dispatch(name, groups, placement),
    )
    fill(layer, dtype)
    return layer


def fill(layer: RoutedExperts, dtype: torch.dtype, times: float = 1.0) -> None:
    """With the weights of these tests, multiplied by ``times``."""
    layer.allocate(torch.device("cpu"))
    w = weights(dtype)
    for slot in layer.slots():
        number, part = slot.part.split(".")
        layer.load(slot.part, slot.tensor, MemoryTensor(slot.part, times * getattr(w, part)[int(number)]))
    layer.finish()


def run_experts(
    groups: ParallelGroups,
    counts: list[int],
    dtype: torch.dtype,
    name: DispatchName,
    placement: ExpertPlacement | None,
    experts: int,
) -> Tensor:
    dp = groups.coordinates.dp
    out: Tensor = build(groups, dtype, name, placement)(*tokens(counts[dp], dp, dtype, experts=experts))
    return out


def check(
    topology: Topology,
    counts: list[int],
    name: DispatchName,
    *,
    dtype: torch.dtype = torch.float32,
    placement: ExpertPlacement | None = None,
    experts: int = EXPERTS,
) -> None:
    results = run_ranks(topology, run_experts, counts, dtype, name, placement, experts)
    for rank, result in enumerate(results):
        dp = topology.coordinates(rank).dp
        wanted = loop_over_tokens(weights(dtype), *tokens(counts[dp], dp, dtype, experts=experts))
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("name", ["local", "all_to_all"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=str)
def test_experts_over_any_topology_equal_a_loop_over_tokens(topology: Topology, name: DispatchName) -> None:
    check(topology, [9, 4, 6][: topology.dp], name)


@pytest.mark.parametrize("name", ["local", "all_to_all"])
@pytest.mark.parametrize("counts", [[0, 5], [1, 0], [0, 0]], ids=str)
def test_ranks_without_tokens_take_part(counts: list[int], name: DispatchName) -> None:
    check(Topology(tp=2, dp=2, ep=2), counts, name)


@pytest.mark.parametrize("name", ["local", "all_to_all"])
@pytest.mark.parametrize("num_tokens", [0, 1, 2])
def test_fewer_tokens_than_ranks_leave_some_slices_empty(num_tokens: int, name: DispatchName) -> None:
    check(Topology(tp=4, ep=4), [num_tokens], name)


@pytest.mark.parametrize("name", ["local", "all_to_all"])
def test_experts_without_tokens_work(name: DispatchName) -> None:
    check(Topology(tp=4, ep=4), [8], name, experts=ACTIVE)  # experts 0, 1, 2 only: two of four ranks have no work


@pytest.mark.parametrize("name", ["local", "all_to_all"])
def test_half_precision_rounds_about_as_on_one_rank(name: DispatchName) -> None:
    check(Topology(tp=2, dp=2, ep=2), [9, 4], name, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["local", "all_to_all"])
def test_an_expert_held_by_several_ranks_counts_once(name: DispatchName) -> None:
    replicated = ExpertPlacement(2, ((0, 1), (0,), (1,), (0, 1), (1,), (0,), (1,)))
    check(Topology(tp=2, ep=2), [9], name, placement=replicated)
    check(Topology(dp=2, ep=2), [9, 4], name, placement=replicated)


@pytest.mark.parametrize("name", ["local", "all_to_all"])
def test_a_rank_may_hold_no_expert_at_all(name: DispatchName) -> None:
    check(Topology(tp=3, ep=3), [5], name, placement=ExpertPlacement(3, ((0,), (2,), (0,), (0,), (2,), (2,), (2,))))


def count_reads(groups: ParallelGroups) -> tuple[int, list[str]]:
    layer = RoutedExperts(
        num_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, groups=groups, format=Dense(torch.float32)
    )
    layer.allocate(torch.device("cpu"))
    w = weights(torch.float32)
    stored = {
        slot.part: MemoryTensor(slot.part, getattr(w, slot.part.split(".")[1])[int(slot.part.split(".")[0])]) for slot in layer.slots()
    }
    for slot in layer.slots():
        layer.load(slot.part, slot.tensor, stored[slot.part])
    assert all(bool(tensor.num_read) == layer.wants(part) for part, tensor in stored.items())
    return sum(tensor.num_read for tensor in stored.values()), list(stored)


def test_each_rank_reads_only_its_share_and_all_ranks_read_everything_once() -> None:
    results = run_ranks(Topology(tp=4, ep=2), count_reads)
    assert sum(read for read, _ in results) == 3 * EXPERTS * HIDDEN * INTERMEDIATE
    assert max(read for read, _ in results) == 3 * 4 * HIDDEN * INTERMEDIATE // 2
    for _, parts in results:
        assert len(parts) == 3 * EXPERTS


def test_a_wrong_shape_is_detected_also_for_an_expert_held_elsewhere() -> None:
    run_ranks(Topology(tp=2, ep=2), load_wrong_shapes)


def load_wrong_shapes(groups: ParallelGroups) -> None:
    layer = build(groups, torch.float32)
    for part in ("0.down", "6.down"):
        with pytest.raises(ShapeMismatch, match=r"shape \[3, 3\] in the checkpoint, \[12, 10\] in the model"):
            layer.load(part, "weight", MemoryTensor(part, torch.zeros(3, 3)))


def test_a_layer_is_not_finished_while_a_tensor_of_an_expert_is_missing() -> None:
    layer = build(single_rank_groups(), torch.float32)
    layer.allocate(torch.device("cpu"))
    for slot in layer.slots():
        if slot.part != "3.up":
            layer.load(slot.part, slot.tensor, MemoryTensor(slot.part, torch.zeros(slot.shape)))
    with pytest.raises(AssertionError, match=r"\{3: 1\}"):
        layer.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_rank_agrees_with_the_experts_of_transformers(dtype: torch.dtype) -> None:
    from transformers import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    config = Qwen2MoeConfig(num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE, hidden_act="silu")
    theirs = Qwen2MoeExperts(config).to(dtype)
    w = weights(dtype)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(torch.cat((w.gate, w.up), dim=1))
        theirs.down_proj.copy_(w.down)
        x, ids, chosen = tokens(17, 5, dtype)
        wanted = theirs(x, ids, chosen)
    ours = build(single_rank_groups(), dtype)(x, ids, chosen)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_all_experts_are_one_call_and_only_their_sum_is_rounded(dtype: torch.dtype) -> None:
    if native() is None:
        pytest.skip("the kernels are not built here")
    layer = build(single_rank_groups(), torch.float32, format=PackedFormat("bf16", torch.float32))
    x, ids, chosen = tokens(9, 0, dtype)
    found = layer(x, ids, chosen)
    assert found.dtype == dtype
    assert torch.equal(found, layer(x.float(), ids, chosen.float()).to(dtype))
    assert not torch.equal(found, layer.compute_sequentially(x, ids, chosen)), "which rounds between up, gate and down"


@pytest.mark.parametrize("kind", ["bf16", "bf16_dot", "fp32", "int8", "int8_dot", "int4", "int4_dot", "int4_zeros_dot"])
def test_an_expert_from_a_host_with_another_processor_can_be_used(kind: Kind) -> None:
    library = native()
    if library is None or kind not in library.kinds:
        pytest.skip("this processor has no such kernel")
    ours, wanted = (build(single_rank_groups(), torch.float32, format=PackedFormat(kind, torch.float32)) for _ in range(2))
    with patch("parallel.packed_format.native", lambda: SimpleNamespace(lanes=24 - library.lanes)):  # 8 or 16
        theirs = build(single_rank_groups(), torch.float32, format=PackedFormat(kind, torch.float32))
    came, sent = ours.held["3"], theirs.held["3"]
    assert isinstance(came, Expert)
    assert isinstance(sent, Expert)
    assert sent.tensors["up.numbers"].shape != came.tensors["up.numbers"].shape
    came.adopt(sent.tensors)
    assert ours.native_experts() is not None
    assert torch.equal(ours(*tokens(9, 0, torch.float32)), wanted(*tokens(9, 0, torch.float32)))


@pytest.mark.parametrize("kind", [None, "fp32"], ids=["one after the other", "all at once"])
def test_a_layer_that_is_loaded_again_computes_with_what_was_loaded_last(kind: Kind | None) -> None:
    library = native()
    if kind is not None and (library is None or kind not in library.kinds):
        pytest.skip("this processor has no such kernel")
    format = PackedFormat(kind, torch.float32) if kind else None
    layer, wanted = (build(single_rank_groups(), torch.float32, format=format) for _ in range(2))
    before = layer(*tokens(9, 0, torch.float32))
    fill(layer, torch.float32, times=2.0)
    assert not torch.equal(layer(*tokens(9, 0, torch.float32)), before)
    fill(layer, torch.float32)
    assert torch.equal(layer(*tokens(9, 0, torch.float32)), wanted(*tokens(9, 0, torch.float32)))


@pytest.mark.parametrize("lanes", [8, 16])
def test_a_moved_expert_is_stored_in_the_arena_like_loaded_ones(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with patch("parallel.packed_format.native", lambda: SimpleNamespace(lanes=lanes)):
        layer = build(single_rank_groups(), torch.float32, format=PackedFormat("int8", torch.float32))
    expert, places, place = layer.held["3"], [], Arena._place
    assert isinstance(expert, Expert)
    came = {name: tensor.clone() for name, tensor in expert.tensors.items()}

    def noting(arena: Arena, num_bytes: int) -> tuple[mmap, int]:
        region, start = place(arena, num_bytes)
        places.append(torch.frombuffer(region, dtype=torch.uint8).data_ptr() + start)
        return region, start

    monkeypatch.setattr(Arena, "_place", noting)
    with patch("parallel.packed_format.native", lambda: SimpleNamespace(lanes=8)):
        expert.adopt(came)
    assert sorted(places) == sorted(tensor.data_ptr() for name, tensor in expert.tensors.items() if "outputs" not in name)


@pytest.mark.parametrize(("experts", "ranks"), [(7, 3), (64, 5), (3, 4), (60, 4)])
def test_a_balanced_placement_holds_every_expert_once(experts: int, ranks: int) -> None:
    placement = balanced_placement(experts, ranks)
    held = [placement.held_by(rank) for rank in range(ranks)]
    assert sorted(expert for part in held for expert in part) == list(range(experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_copies_of_an_expert_take_its_tokens_in_turn() -> None:
    table = ExpertPlacement(3, ((0, 1, 2), (1,), (0, 2))).table(torch.device("cpu"))
    ids = torch.tensor([[0, 1], [0, 2], [0, 2], [1, 0]])
    assert table.choose(ids).tolist() == [[0, 1], [1, 2], [2, 0], [1, 0]]


@pytest.mark.parametrize("holders", [((),), ((2,),), ((1, 0),), ((0, 0),), ((-1,),)])
def test_an_invalid_placement_is_rejected(holders: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidPlacement, match="expert 0 is held by"):
        ExpertPlacement(2, holders)
