"""Ranks and coordinates: properties of every topology, and the examples of the docstrings."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.topology import Coordinates, InvalidTopology, Topology, TopologyAxis

AXES = get_args(TopologyAxis)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    tp, dp, pp = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    ep = draw(st.sampled_from([n for n in range(1, tp * dp + 1) if tp * dp % n == 0]))
    return Topology(tp=tp, dp=dp, pp=pp, ep=ep)


@given(topologies())
def test_every_rank_has_its_own_coordinates_in_both_views_of_a_stage(topology: Topology) -> None:
    places = [topology.coordinates(rank) for rank in range(topology.size)]
    assert len({(place.pp, place.dp, place.tp) for place in places}) == topology.size
    assert len({(place.pp, place.ep, place.expert_tp) for place in places}) == topology.size
    for place in places:
        assert place.tp in range(topology.tp)
        assert place.dp in range(topology.dp)
        assert place.pp in range(topology.pp)
        assert place.ep in range(topology.ep)
        assert place.expert_tp in range(topology.expert_tp)


@given(topologies(), st.sampled_from(AXES))
def test_the_peers_along_an_axis_partition_the_ranks(topology: Topology, axis: TopologyAxis) -> None:
    groups = {topology.peers(rank, axis) for rank in range(topology.size)}
    assert sorted(rank for group in groups for rank in group) == list(range(topology.size))
    sizes = {"world": topology.size, "stage": topology.ranks_per_stage}
    assert {len(group) for group in groups} == {sizes.get(axis) or getattr(topology, axis)}
    for rank in range(topology.size):
        peers = topology.peers(rank, axis)
        assert rank in peers
        assert list(peers) == sorted(peers)


@given(topologies(), st.sampled_from(["tp", "dp", "pp", "ep", "expert_tp"]))
def test_the_position_among_peers_is_the_coordinate(topology: Topology, axis: TopologyAxis) -> None:
    for rank in range(topology.size):
        assert topology.peers(rank, axis).index(rank) == getattr(topology.coordinates(rank), axis)


@given(topologies())
def test_tp_and_expert_tp_neighbours_have_neighbouring_ranks(topology: Topology) -> None:
    for rank in range(topology.size):
        for axis in ("tp", "expert_tp", "stage"):
            peers = topology.peers(rank, axis)
            assert list(peers) == list(range(peers[0], peers[0] + len(peers)))


def test_the_example_of_the_docstring() -> None:
    topology = Topology(tp=2, dp=2, ep=2)
    places = [topology.coordinates(rank) for rank in range(4)]
    assert [place.tp for place in places] == [0, 1, 0, 1]
    assert [place.dp for place in places] == [0, 0, 1, 1]
    assert [place.ep for place in places] == [0, 0, 1, 1]
    assert [place.expert_tp for place in places] == [0, 1, 0, 1]
    assert Topology(tp=2, pp=2).coordinates(3) == Coordinates(tp=1, dp=0, pp=1, ep=0, expert_tp=1)


@pytest.mark.parametrize(
    ("sizes", "message"), [({"tp": 0}, "tp must be at least 1"), ({"tp": 2, "ep": 3}, "ep=3 does not divide the 2 ranks")]
)
def test_sizes_that_cannot_form_a_replica_are_rejected(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidTopology, match=message):
        Topology(**sizes)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_topology_is_rejected(rank: int) -> None:
    with pytest.raises(InvalidTopology, match=f"rank {rank} is outside"):
        Topology(tp=2, pp=2).coordinates(rank)


def test_a_topology_is_printed_by_the_axes_it_uses() -> None:
    assert str(Topology()) == "one rank"
    assert str(Topology(tp=4, ep=2)) == "tp 4 x ep 2"
