"""The process groups of a topology, created and destroyed by one context manager, `open_groups`."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, get_args

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed exports it only where it was built with it

from parallel.shared_memory import open_shared_memory
from parallel.symmetric_memory import open_symmetric_memory
from parallel.topology import Coordinates, InvalidTopology, Topology, TopologyAxis
from parallel.transport import Backend, Transport

logger = logging.getLogger(__name__)

TransportChoice = Literal["auto", "gloo"]
"""``auto``: NCCL on CUDA; on CPU shared memory where possible, and gloo for the rest. ``gloo``: only gloo."""
REDUCE_AXES: tuple[TopologyAxis, ...] = ("tp", "ep", "expert_tp", "stage")
"""Axes along which the model all-reduces; along the others it sends or gathers."""


@dataclass(frozen=True)
class Group:
    """One topology axis as seen by one rank: its ``ranks``, this rank's position among them, and the transport.

    ``transport`` is None exactly when ``size`` is 1: collectives are then the identity.
    """

    axis: TopologyAxis
    rank: int
    size: int
    ranks: tuple[int, ...]
    transport: Transport | None = None

    def __repr__(self) -> str:
        return f"<Group {self.axis} {self.rank} of {self.size} [ranks {self.ranks} | {self.transport or 'alone'}]>"


def single_rank_group(axis: TopologyAxis, rank: int = 0) -> Group:
    """A group of one."""
    return Group(axis=axis, rank=0, size=1, ranks=(rank,))


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """A rank's position in its replica, and its group along every axis."""

    topology: Topology
    rank: int
    coordinates: Coordinates
    tp: Group
    dp: Group
    pp: Group
    ep: Group
    expert_tp: Group
    stage: Group
    world: Group


@dataclass(frozen=True)
class Rendezvous:
    """The address where the ranks of a replica meet. Rank 0 listens on it, and on no other address."""

    host: str
    port: int


def free_rendezvous(host: str = "127.0.0.1") -> Rendezvous:
    """A port of ``host`` (an address of this machine) that is free now."""
    with _listen(host, 0) as listener:
        return Rendezvous(host, listener.getsockname()[1])


def single_rank_groups() -> ParallelGroups:
    """The groups of a single-rank replica: no torch.distributed, collectives are the identity."""
    return _parallel_groups(Topology(), 0, {})


@contextmanager
def open_groups(
    topology: Topology,
    rank: int,
    *,
    rendezvous: Rendezvous,
    device: torch.device,
    timeout_s: float = 300.0,
    transport: TransportChoice = "auto",
    symmetric: bool = True,
) -> Iterator[ParallelGroups]:
    """Join the other ranks of the replica; leave on exit. Every rank must call this at about the same time.

    ``timeout_s`` bounds joining and each later collective, except all-reduces through symmetric memory: their kernels wait on the
    device for a missing rank without limit (NCCL collectives launched behind them are bounded, and so is a step, by the replica).
    ``symmetric``: on CUDA, use symmetric memory for all-reduces where possible.

    Raises:
        InvalidTopology: the rank is outside the topology.
        RuntimeError: this process has joined a replica already.
        torch.distributed.DistError: the other ranks did not join in time, or a collective failed.
    """
    if topology.size == 1:
        if rank != 0:
            raise InvalidTopology(f"rank {rank} is outside this topology of one rank")
        yield single_rank_groups()
        return
    topology.coordinates(rank)
    if dist.is_initialized():
        raise RuntimeError("this process has joined a process group already; leave it before opening another")
    backend: Backend = "nccl" if device.type == "cuda" else "gloo"
    with ExitStack() as stack:
        stack.enter_context(_bound_to_interface(_own_address(rendezvous)))
        if backend == "nccl":
            torch.cuda.set_device(device)
        stack.callback(_leave)
        store = _store(rendezvous, topology.size, rank, timeout_s)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=topology.size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
        transports = _transports(topology, rank, backend, transport, timeout_s)
        if backend == "nccl" and symmetric:
            transports = _with_symmetric(transports, topology, rank, device, store)
        for each in transports.values():
            if each.shared_memory is not None:
                stack.callback(each.shared_memory.close)
        groups = _parallel_groups(topology, rank, transports)
        logger.info("rank %d of %d joined (%s): %s", rank, topology.size, topology, groups.world.transport)
        yield groups


def _parallel_groups(topology: Topology, rank: int, transports: dict[tuple[int, ...], Transport]) -> ParallelGroups:
    def group(axis: TopologyAxis) -> Group:
        ranks = topology.peers(rank, axis)
        return Group(axis=axis, rank=ranks.index(rank), size=len(ranks), ranks=ranks, transport=transports.get(ranks))

    return ParallelGroups(
        topology=topology,
        rank=rank,
        coordinates=topology.coordinates(rank),
        tp=group("tp"),
        dp=group("dp"),
        pp=group("pp"),
        ep=group("ep"),
        expert_tp=group("expert_tp"),
        stage=group("stage"),
        world=group("world"),
    )


def _transports(
    topology: Topology, rank: int, backend: Backend, choice: TransportChoice, timeout_s: float
) -> dict[tuple[int, ...], Transport]:
    """A transport for every set of two or more ranks that share an axis, by its ranks.

    torch requires every rank to create every group, also those without it, in the same order. In that order, too, the members of each
    group set up shared memory.
    """
    world = tuple(range(topology.size))
    assert dist.group.WORLD is not None
    process_groups = {world: dist.group.WORLD}
    for axis in get_args(TopologyAxis):
        for each in world:
            ranks = topology.peers(each, axis)
            if len(ranks) > 1 and ranks not in process_groups:
                process_groups[ranks] = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), backend=backend)
    shares = backend == "gloo" and choice == "auto"
    return {
        ranks: Transport(backend, process_group, open_shared_memory(process_group, timeout_s) if shares and rank in ranks else None)
        for ranks, process_group in process_groups.items()
    }


def _with_symmetric(
    transports: dict[tuple[int, ...], Transport], topology: Topology, rank: int, device: torch.device, store: TCPStore
) -> dict[tuple[int, ...], Transport]:
    """``transports`` with symmetric memory added for the groups that this rank all-reduces over, where possible."""
    found = dict(transports)
    for ranks, each in transports.items():
        axes = [axis for axis in REDUCE_AXES if topology.peers(rank, axis) == ranks]
        if axes:
            name = f"ranks {', '.join(map(str, ranks))} ({', '.join(axes)})"
            found[ranks] = replace(each, symmetric_memory=open_symmetric_memory(each.process_group, device, name=name, store=store))
    return found


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def _store(rendezvous: Rendezvous, size: int, rank: int, timeout_s: float) -> TCPStore:
    """The replica's key-value store. By default it would listen on every address of the host, so we bind it ourselves."""
    listen_fd = _listen(rendezvous.host, rendezvous.port).detach() if rank == 0 else None
    return TCPStore(
        rendezvous.host,
        rendezvous.port,
        size,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listen_fd,
        use_libuv=True,
    )


def _own_address(rendezvous: Rendezvous) -> str:
    """This machine's address on the route to the rendezvous. Connecting a datagram socket sends nothing."""
    family, _, _, _, address = socket.getaddrinfo(rendezvous.host, rendezvous.port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


@contextmanager
def _bound_to_interface(address: str) -> Iterator[None]:
    """Make gloo and NCCL use the network interface of ``address``, unless the operator has chosen one.

    By default gloo uses the interface that the host's name resolves to, and NCCL the first that looks suitable; in a container the
    other ranks may not reach either. NCCL may connect later, so this must last as long as the groups.
    """
    interface = next(
        (name for name, addresses in psutil.net_if_addrs().items() if any(a.address.split("%")[0] == address for a in addresses)), None
    )
    chosen = [name for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface and name not in os.environ]
    for name in chosen:
        os.environ[name] = str(interface)
    try:
        yield
    finally:
        for name in chosen:
            os.environ.pop(name, None)
