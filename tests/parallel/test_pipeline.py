"""Pipeline stages: their layers, and sending hidden states between them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel.collectives import barrier
from parallel.groups import ParallelGroups, single_rank_group
from parallel.pipeline import HiddenSender, is_first_stage, is_last_stage, receive_hidden, stage_layers
from parallel.topology import Topology
from tests.ranks import run_ranks


@given(st.integers(1, 100), st.integers(1, 16))
def test_stages_hold_every_layer_once_in_order(num_layers: int, pp: int) -> None:
    if pp > num_layers:
        with pytest.raises(ValueError, match=f"use pp={num_layers} at most"):
            stage_layers(num_layers, pp, 0)
        return
    stages = [stage_layers(num_layers, pp, rank) for rank in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def through_all_stages(groups: ParallelGroups, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if is_first_stage(groups.pp):
        x = torch.full(shape, 2.0 + groups.tp.rank, dtype=dtype)
    else:
        x = receive_hidden(shape, groups.pp, dtype=dtype, device=torch.device("cpu"))
    for layer in stage_layers(5, groups.pp.size, groups.pp.rank):
        x = x * (layer + 1)
    if is_last_stage(groups.pp):
        barrier(groups.world)
        return x
    sender = HiddenSender(groups.pp)
    sender.send(x)
    barrier(groups.world)
    return None


@pytest.mark.parametrize("shape", [(3, 4), (1, 8), (0, 4)], ids=str)
@pytest.mark.parametrize("topology", [Topology(), Topology(pp=2), Topology(pp=3), Topology(pp=2, tp=2)], ids=str)
def test_hidden_states_pass_through_every_stage_in_turn(topology: Topology, shape: tuple[int, ...]) -> None:
    results = run_ranks(topology, through_all_stages, shape, torch.float32)
    for rank, result in enumerate(results):
        if topology.coordinates(rank).pp < topology.pp - 1:
            assert result is None
        else:
            assert torch.equal(result, torch.full(shape, (2.0 + topology.coordinates(rank).tp) * 120))


def one_step_ahead(groups: ParallelGroups) -> list[float]:
    shape = (512, 512)
    if is_first_stage(groups.pp):
        sender = HiddenSender(groups.pp)
        sender.send(torch.full(shape, 1.0))
        barrier(groups.world)  # the other stage has fetched nothing yet
        sender.send(torch.full(shape, 2.0))
        barrier(groups.world)
        return []
    barrier(groups.world)
    received = [receive_hidden(shape, groups.pp, dtype=torch.float32, device=torch.device("cpu")) for _ in range(2)]
    barrier(groups.world)
    return [x.mean().item() for x in received]


def test_a_stage_continues_while_its_hidden_states_are_being_sent() -> None:
    assert run_ranks(Topology(pp=2), one_step_ahead, timeout_s=120) == [[], [1.0, 2.0]]


def test_the_first_stage_cannot_receive_and_the_last_cannot_send() -> None:
    alone = single_rank_group("pp")
    assert is_first_stage(alone)
    assert is_last_stage(alone)
    with pytest.raises(ValueError, match="last stage"):
        HiddenSender(alone).send(torch.zeros(1))
    with pytest.raises(ValueError, match="first stage"):
        receive_hidden((1,), alone, dtype=torch.float32, device=torch.device("cpu"))
