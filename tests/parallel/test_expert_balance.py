"""Placement of experts, moving them, and that results do not depend on where they are."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.axes import IN, OUT
from parallel.dispatch import DispatchName
from parallel.expert_balance import even_capacity, imbalance, place_experts, rank_loads, relabelled
from parallel.expert_moves import Drop, Move, plan_moves, receive_expert, send_expert
from parallel.expert_placement import ExpertPlacement, InvalidPlacement, balanced_placement
from parallel.groups import ParallelGroups
from parallel.topology import Topology
from parallel.weight_format import TensorSpec, WeightFormat
from tests.parallel.test_experts import EXPERTS, build, loop_over_tokens, tokens, weights
from tests.ranks import run_ranks

LOADS = st.lists(st.integers(0, 1000), min_size=1, max_size=40)


@given(LOADS, st.integers(1, 12), st.integers(0, 4))
def test_no_position_has_more_load_than_the_heaviest_of_an_even_placement(loads: list[int], ranks: int, redundant: int) -> None:
    room = even_capacity(len(loads), ranks, redundant)
    placement = place_experts(loads, room)
    assert max(rank_loads(placement, loads)) <= max(rank_loads(balanced_placement(len(loads), ranks), loads)) + 1e-9
    assert all(len(placement.held_by(rank)) <= room[rank] for rank in range(ranks))
    assert sum(rank_loads(placement, loads)) == pytest.approx(sum(loads))
    assert placement == place_experts(loads, room)


@given(st.lists(st.integers(1, 1000), min_size=8, max_size=40), st.integers(2, 8))
def test_without_redundant_capacity_every_expert_is_held_once(loads: list[int], ranks: int) -> None:
    placement = place_experts(loads, even_capacity(len(loads), ranks))
    assert all(len(holders) == 1 for holders in placement.holders)


def test_the_most_used_expert_is_replicated() -> None:
    loads = [100, 1, 1, 1, 1, 1, 1, 1]
    placement = place_experts(loads, even_capacity(8, 2, redundant=1))
    assert placement.holders[0] == (0, 1)
    assert imbalance(placement, loads) < 1.05 < 1.8 < imbalance(balanced_placement(8, 2), loads)


def test_64_experts_on_16_ranks_with_capacity_for_five_fill_it_evenly() -> None:
    placement = place_experts([1.0] * 64, even_capacity(64, 16, redundant=1))
    assert [len(placement.held_by(rank)) for rank in range(16)] == [5] * 16
    assert sum(len(holders) == 2 for holders in placement.holders) == 16
    assert max(rank_loads(placement, [1.0] * 64)) <= 4.0 + 1e-9


def test_too_little_capacity_is_rejected() -> None:
    with pytest.raises(InvalidPlacement, match="5 experts do not fit"):
        place_experts([1.0] * 5, (2, 2))


def test_no_load_is_no_imbalance() -> None:
    assert imbalance(balanced_placement(4, 2), [0, 0, 0, 0]) == 1.0


@st.composite
def placements(draw: st.DrawFn) -> tuple[ExpertPlacement, ExpertPlacement]:
    """Any two placements of the same size."""
    ranks, experts = draw(st.integers(1, 6)), draw(st.integers(1, 20))
    holders = st.sets(st.integers(0, ranks - 1), min_size=1).map(lambda held: tuple(sorted(held)))
    one, other = (draw(st.lists(holders, min_size=experts, max_size=experts)) for _ in range(2))
    return ExpertPlacement(ranks, tuple(one)), ExpertPlacement(ranks, tuple(other))


@given(placements())
def test_the_moves_lead_to_the_target_and_exceed_the_capacity_by_at_most_one(pair: tuple[ExpertPlacement, ExpertPlacement]) -> None:
    current, target = pair
    held = [set(current.held_by(rank)) for rank in range(current.num_ranks)]
    room = [max(len(current.held_by(rank)), len(target.held_by(rank))) for rank in range(current.num_ranks)]
    for step in plan_moves(current, target):
        if isinstance(step, Move):
            assert step.expert in held[step.source]
            assert step.expert not in held[step.target]
            held[step.target].add(step.expert)
        else:
            held[step.rank].remove(step.expert)
        assert all(any(expert in experts for experts in held) for expert in range(current.num_experts))
        assert sum(max(0, len(experts) - places) for experts, places in zip(held, room, strict=True)) <= 1
    assert held == [set(target.held_by(rank)) for rank in range(target.num_ranks)]


def test_two_positions_swap_experts_through_one_spare_place() -> None:
    one, other = ExpertPlacement(2, ((0,), (0,), (1,), (1,))), ExpertPlacement(2, ((1,), (0,), (0,), (1,)))
    assert list(plan_moves(one, other)) == [Move(0, 0, 1), Drop(0, 0), Move(2, 1, 0), Drop(2, 1)]


@given(LOADS, LOADS, st.integers(1, 6), st.integers(0, 2))
def test_relabelling_positions_keeps_the_loads_and_does_not_move_more(
    before: list[int], after: list[int], ranks: int, redundant: int
) -> None:
    count = min(len(before), len(after))
    room = even_capacity(count, ranks, redundant)
    current, target = place_experts(before[:count], room), place_experts(after[:count], room)
    found = relabelled(target, current, room)
    assert sorted(rank_loads(found, after[:count])) == pytest.approx(sorted(rank_loads(target, after[:count])))
    assert all(len(found.held_by(rank)) <= room[rank] for rank in range(ranks))
    assert relabelled(current, current, room) == current


class Transposed:
    """A format whose loaded form differs from its stored form, like one that repacks."""

    def specs(self) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec((OUT, IN), torch.float32)}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"repacked": tensors["weight"].t().contiguous() * 2}

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return x @ tensors["repacked"] / 2


MOVES = [
    ExpertPlacement(2, ((1,), (1,), (1,), (0,), (0,), (0,), (0,))),
    ExpertPlacement(2, ((0, 1), (0,), (1,), (0, 1), (1,), (0,), (1,))),
    ExpertPlacement(2, ((1,),) * 7),
    balanced_placement(EXPERTS, 2),
]


def compute_while_moving(groups: ParallelGroups, name: DispatchName, format: WeightFormat | None = None) -> list[Tensor]:
    """Results for the same tokens after every move, and what each rank holds then."""
    dp = groups.coordinates.dp
    layer = build(groups, torch.float32, name, format=format)
    found = [layer(*tokens(9, dp, torch.float32))]
    for placement in MOVES:
        layer.move_to(placement)
        assert sorted(int(number) for number in layer.held) == list(placement.held_by(groups.ep.rank))
        found.append(layer(*tokens(9, dp, torch.float32)))
    return found


@pytest.mark.parametrize("name", ["local", "all_to_all"])
@pytest.mark.parametrize("topology", [Topology(tp=2, ep=2), Topology(tp=4, ep=2), Topology(tp=2, dp=2, ep=2)], ids=str)
def test_results_do_not_depend_on_where_experts_were_moved(topology: Topology, name: DispatchName) -> None:
    for rank, results in enumerate(run_ranks(topology, compute_while_moving, name)):
        wanted = loop_over_tokens(weights(torch.float32), *tokens(9, topology.coordinates(rank).dp, torch.float32))
        for found in results:
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_experts_are_moved_in_packed_form() -> None:
    wanted = loop_over_tokens(weights(torch.float32), *tokens(9, 0, torch.float32))
    for results in run_ranks(Topology(tp=2, ep=2), compute_while_moving, "local", Transposed()):
        for found in results:
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def count_load(groups: ParallelGroups) -> list[int] | None:
    layer = build(groups, torch.float32)
    for _ in range(2):
        layer(*tokens(9, groups.coordinates.dp, torch.float32))
    return None if layer.load_E is None else layer.load_E.tolist()


def test_each_rank_counts_where_its_own_tokens_were_sent() -> None:
    topology = Topology(tp=2, dp=2, ep=2)
    for rank, found in enumerate(run_ranks(topology, count_load)):
        _, ids, _ = tokens(9, topology.coordinates(rank).dp, torch.float32)
        assert found == (2 * torch.bincount(ids.flatten(), minlength=EXPERTS)).tolist()
    assert run_ranks(Topology(tp=2), count_load) == [None, None]  # no choice of places, nothing to count


def tensors_of_all_kinds() -> dict[str, Tensor]:
    """As formats make them: packed, transposed, 8-bit, empty, scalar."""
    return {
        "up.qweight": torch.arange(24, dtype=torch.int32).view(4, 6),
        "up.transposed": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).t(),
        "up.fp8": torch.tensor([[0.5, -1.25], [3.0, 0.0]]).to(torch.float8_e4m3fn),
        "down.scale": torch.tensor(0.125, dtype=torch.bfloat16),
        "down.nothing": torch.empty(0, 7, dtype=torch.float16),
        "down.blocks": torch.arange(2 * 3 * 4, dtype=torch.int8).view(2, 3, 4).permute(2, 0, 1),
    }


def differences(groups: ParallelGroups) -> list[str]:
    """Names of tensors that arrived changed (by name, as not every dtype can be pickled)."""
    everything = tensors_of_all_kinds()
    if groups.ep.rank == 0:
        send_expert(everything, 1, groups.ep)
        return []
    received = receive_expert(0, groups.ep, torch.device("cpu"))
    assert list(received) == list(everything)
    return [name for name, sent in everything.items() if not same(received[name], sent)]


def same(found: Tensor, wanted: Tensor) -> bool:
    alike = (found.dtype, found.shape) == (wanted.dtype, wanted.shape) and (found.numel() < 2 or found.stride() == wanted.stride())
    return alike and torch.equal(found.float(), wanted.float())


def test_sent_tensors_of_every_dtype_arrive_unchanged() -> None:
    assert run_ranks(Topology(tp=2, ep=2), differences) == [[], []]
