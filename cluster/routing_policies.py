"""Place 4 of a request: the routing policies, and which one the settings choose."""

import itertools
from collections.abc import Sequence
from typing import Protocol, TypeVar

from cluster.config import RouterConfig
from cluster.expected_wait import ExpectedWait, RoutableReplica
from engine.config import EngineConfig
from engine.request import Request
from parallel.topology import Topology


class Candidate(RoutableReplica, Protocol):
    """A replica that a policy may choose."""

    @property
    def load(self) -> int:
        """Requests that run or wait there."""
        ...


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


class RoutingPolicy(Protocol):
    def choose(self, candidates: Sequence[AnyCandidate], request: Request) -> AnyCandidate:
        """Choose one of ``candidates``; there is at least one."""
        ...


class LeastLoaded:
    """Chooses the replica with the fewest requests; ties are broken in turn."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def choose(self, candidates: Sequence[AnyCandidate], request: Request) -> AnyCandidate:
        least = min(candidate.load for candidate in candidates)
        equals = [candidate for candidate in candidates if candidate.load == least]
        return equals[next(self._turn) % len(equals)]


class RoundRobin:
    """Chooses each replica in turn."""

    def __init__(self) -> None:
        self._turn = itertools.count()

    def choose(self, candidates: Sequence[AnyCandidate], request: Request) -> AnyCandidate:
        return candidates[next(self._turn) % len(candidates)]


def make_routing_policy(config: RouterConfig, engine_config: EngineConfig, topology: Topology) -> RoutingPolicy:
    """The policy that ``config`` names. ``topology`` is that of every replica: each of its data-parallel shards adds to a step's tokens."""
    match config.policy:
        case "least_loaded":
            return LeastLoaded()
        case "round_robin":
            return RoundRobin()
        case "expected_wait":
            return ExpectedWait(
                block_tokens=engine_config.block_tokens,
                step_tokens=engine_config.max_step_tokens * topology.dp,
                session_worth_s=config.session_worth_s,
            )
