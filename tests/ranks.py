"""Runs a function on every rank of a topology, in real processes that talk over gloo."""

import atexit
import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

from parallel.groups import ParallelGroups, Rendezvous, TransportChoice, free_rendezvous, open_groups, single_rank_groups
from parallel.topology import Topology

GRACE_S = 2.0
"""How long the other ranks may take to tell that they failed, too, before the first failure is raised."""


class RankFailed(Exception):
    """A rank's process ended, did not answer, or raised something that cannot be sent; the message says which."""


class _TracebackOfRank(Exception):
    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def run_ranks(
    topology: Topology, function: Callable[..., Any], *args: Any, transport: TransportChoice = "gloo", timeout_s: float = 120.0
) -> list[Any]:
    """``function(groups, *args)`` on every rank at the same time, one thread each; what each rank returned, in order.

    ``function`` must be at the top level of its module, and all that goes in and out must pickle. The processes are
    kept for later calls with the same number of ranks. If one rank raises, that is raised here (with the rank's
    traceback) and all of them are ended. One rank runs in the caller's process.
    """
    if topology.size == 1:
        return [_call_alone(function, args)]
    pool = _POOLS.pop(topology.size, None) or _Pool(topology.size)
    try:
        results = pool.run(topology, function, args, transport, timeout_s)
    except BaseException:
        pool.kill()
        raise
    _POOLS[topology.size] = pool
    return results


def end_pools() -> None:
    """End all kept processes; the next call starts new ones."""
    while _POOLS:
        _POOLS.popitem()[1].kill()


_POOLS: "dict[int, _Pool]" = {}
atexit.register(end_pools)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """How a call ended on one rank."""

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    ended_at: float
    """By the clock that all processes of the host share: a rank that raises makes its peers fail after it."""


class _Pool:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")  # imports torch once, for all pools
        context.set_forkserver_preload(["parallel.groups", "parallel.collectives"])
        self.connections: list[Connection] = []
        self.processes: list[ForkServerProcess] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(
        self, topology: Topology, function: Callable[..., Any], args: tuple[Any, ...], transport: TransportChoice, timeout_s: float
    ) -> list[Any]:
        rendezvous = free_rendezvous()
        for rank, connection in enumerate(self.connections):
            connection.send_bytes(pickle.dumps((topology, rank, rendezvous, transport, timeout_s, function, args)))
        outcomes: dict[int, _Outcome] = {}
        deadline = time.monotonic() + timeout_s
        while len(outcomes) < topology.size:
            waiting = {self.connections[rank]: rank for rank in range(topology.size) if rank not in outcomes}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection, rank in waiting.items():
                if connection in ready:
                    outcomes[rank] = _receive(connection, rank)
            if any(outcome.error for outcome in outcomes.values()):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        failed = [outcome for outcome in outcomes.values() if outcome.error]
        if failed:
            first = min(failed, key=lambda outcome: outcome.ended_at)
            assert first.error is not None
            raise first.error from _TracebackOfRank(first.traceback)
        if len(outcomes) < topology.size:
            raise RankFailed(f"ranks {sorted(set(range(topology.size)) - set(outcomes))} of {topology} did not answer in {timeout_s:g} s")
        return [outcomes[rank].value for rank in range(topology.size)]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()


def _receive(connection: Connection, rank: int) -> _Outcome:
    try:
        outcome = pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        return _Outcome(error=RankFailed(f"the process of rank {rank} ended"), ended_at=0.0)
    assert isinstance(outcome, _Outcome)
    return outcome


def _serve(connection: Connection) -> None:
    """A rank's process: run what comes until the other end is closed."""
    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_outcome(message))


def _outcome(message: bytes) -> bytes:
    rank = -1
    try:
        topology, rank, rendezvous, transport, timeout_s, function, args = pickle.loads(message)
        result = _call(topology, rank, rendezvous, transport, timeout_s, function, args)
        return pickle.dumps(_Outcome(value=result, ended_at=time.monotonic()))
    except BaseException as error:
        ended_at, text = time.monotonic(), f"on rank {rank}:\n{traceback.format_exc()}"
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RankFailed(f"rank {rank} raised {error!r}")
        return pickle.dumps(_Outcome(error=error, traceback=text, ended_at=ended_at))


def _call(
    topology: Topology,
    rank: int,
    rendezvous: Rendezvous,
    transport: TransportChoice,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    torch.manual_seed(0)
    with open_groups(topology, rank, rendezvous=rendezvous, device=torch.device("cpu"), timeout_s=timeout_s, transport=transport) as groups:
        return function(groups, *args)


def _call_alone(function: Callable[[ParallelGroups], Any], args: tuple[Any, ...]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(single_rank_groups(), *args)
    finally:
        torch.set_num_threads(threads)
