"""The process groups of a topology, opened and closed by one context manager."""

from dataclasses import dataclass
from typing import Any

from parallel.topology import TopologyAxis


@dataclass(frozen=True)
class Group:
    """One topology axis as one rank sees it: who is on it, where this rank stands, and how its members talk.

    ``transport`` is None exactly when ``size`` is 1: collectives are then the identity.
    """

    axis: TopologyAxis
    rank: int
    size: int
    ranks: tuple[int, ...]
    transport: Any = None


def single(axis: TopologyAxis, rank: int = 0) -> Group:
    """A group of one."""
    return Group(axis=axis, rank=0, size=1, ranks=(rank,))
