"""Opening and leaving the groups of a replica, and the guarantees of the test fixture for ranks."""

import os
import socket
import time
from typing import Any, cast, get_args

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from parallel.collectives import all_gather, barrier
from parallel.groups import (
    ParallelGroups,
    Rendezvous,
    _own_address,
    _with_symmetric,
    free_rendezvous,
    open_groups,
    single_rank_groups,
)
from parallel.topology import InvalidTopology, Topology, TopologyAxis
from parallel.transport import Transport
from tests.ranks import RankFailed, run_ranks

CPU = torch.device("cpu")
AXES = ("tp", "dp", "pp", "ep", "expert_tp", "stage", "world")


def ranks_along_every_axis(groups: ParallelGroups) -> dict[str, tuple[int, tuple[int, ...], list[int]]]:
    def gathered(axis: str) -> list[int]:
        ranks: list[int] = all_gather(torch.tensor([groups.rank]), getattr(groups, axis), dim=0).tolist()
        return ranks

    return {axis: (getattr(groups, axis).rank, getattr(groups, axis).ranks, gathered(axis)) for axis in AXES}


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, dp=2, ep=2), Topology(tp=2, pp=2), Topology(tp=3, ep=3)], ids=str)
def test_each_axis_connects_exactly_its_peers(topology: Topology) -> None:
    for rank, found in enumerate(run_ranks(topology, ranks_along_every_axis)):
        for axis in AXES:
            peers = topology.peers(rank, axis)  # type: ignore[arg-type]
            assert found[axis] == (peers.index(rank), peers, list(peers))


def which_transports(groups: ParallelGroups) -> tuple[bool, bool, str, str]:
    return groups.tp.transport is groups.stage.transport, groups.pp.transport is None, repr(groups.tp), repr(groups.pp)


def test_equal_groups_share_one_transport_and_a_group_of_one_has_none() -> None:
    first, _ = run_ranks(Topology(tp=2), which_transports)
    assert first == (True, True, "<Group tp 0 of 2 [ranks (0, 1) | gloo]>", "<Group pp 0 of 1 [ranks (0,) | alone]>")


def test_symmetric_memory_is_only_for_groups_that_all_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("parallel.groups.open_symmetric_memory", lambda *_, name, store: asked.append(name))
    topology, group, store = Topology(tp=2, dp=2, pp=2, ep=4), cast("dist.ProcessGroup", None), cast("TCPStore", None)
    sets = [topology.peers(rank, axis) for axis in get_args(TopologyAxis) for rank in range(8)]
    transports = {ranks: Transport("nccl", group) for ranks in sets if len(ranks) > 1}
    assert _with_symmetric(transports, topology, 6, CPU, store).keys() == transports.keys()
    assert asked == ["ranks 6, 7 (tp)", "ranks 4, 5, 6, 7 (ep, stage)"], "not those of dp, of pp, of others, nor all"


def process_and_environment(groups: ParallelGroups) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("GLOO_SOCKET_IFNAME")


def test_one_process_can_join_again_and_again_and_is_bound_to_the_interface_of_the_rendezvous() -> None:
    first = run_ranks(Topology(tp=2), process_and_environment)
    assert run_ranks(Topology(pp=2), process_and_environment) == first
    assert {interface for _, interface in first} == {"lo"}
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_one_rank_opens_no_process_group() -> None:
    with open_groups(Topology(), 0, rendezvous=Rendezvous("127.0.0.1", 1), device=CPU) as groups:
        assert groups == single_rank_groups()
        assert not dist.is_initialized()
    with (
        pytest.raises(InvalidTopology, match="rank 1 is outside"),
        open_groups(Topology(), 1, rendezvous=Rendezvous("127.0.0.1", 1), device=CPU),
    ):
        pass


def test_waiting_for_a_missing_peer_times_out() -> None:
    start = time.monotonic()
    with (
        pytest.raises(RuntimeError),
        open_groups(Topology(tp=2), 0, rendezvous=free_rendezvous(), device=CPU, timeout_s=1.0),
    ):
        pass
    assert time.monotonic() - start < 20
    assert not dist.is_initialized()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def reach_the_store(groups: ParallelGroups) -> dict[str, bool]:
    """Seen from rank 1: the addresses of this host on which the store of rank 0 listens."""
    if groups.rank == 0:
        barrier(groups.world)
        return {}
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    reached = {}
    for address in ("127.0.0.1", "127.0.0.2"):
        with socket.socket() as probe:
            probe.settimeout(5)
            reached[address] = probe.connect_ex((address, store.port)) == 0
    barrier(groups.world)
    return reached


def test_rank_0_listens_on_the_address_of_the_rendezvous_only() -> None:
    assert run_ranks(Topology(tp=2), reach_the_store)[1] == {"127.0.0.1": True, "127.0.0.2": False}


def test_the_own_address_is_the_one_that_reaches_the_rendezvous() -> None:
    assert _own_address(Rendezvous("127.0.0.1", 9)) == "127.0.0.1"


def raise_on_rank_1(groups: ParallelGroups) -> None:
    if groups.rank == 1:
        raise KeyError("the key that rank 1 missed")
    all_gather(torch.zeros(1), groups.world, dim=0)


def test_what_a_rank_raises_is_raised_in_the_test_with_the_ranks_traceback() -> None:
    with pytest.raises(KeyError, match="the key that rank 1 missed") as caught:
        run_ranks(Topology(tp=2), raise_on_rank_1)
    assert "in raise_on_rank_1" in str(caught.value.__cause__)
    assert run_ranks(Topology(tp=2), process_and_environment)  # new processes take the place of the old


def die_on_rank_1(groups: ParallelGroups) -> None:
    if groups.rank == 1:
        os._exit(7)
    time.sleep(60)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankFailed, match="the process of rank 1 ended"):
        run_ranks(Topology(tp=2), die_on_rank_1)


def hang_on_rank_0(groups: ParallelGroups) -> None:
    if groups.rank == 0:
        time.sleep(60)


def test_a_rank_that_hangs_is_named_after_the_time_given() -> None:
    with pytest.raises(RankFailed, match=r"ranks \[0\] of tp 2 did not answer in 5 s"):
        run_ranks(Topology(tp=2), hang_on_rank_0, timeout_s=5.0)
