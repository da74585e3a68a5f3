"""Where the ranks of a replica are placed: a topology to Ray placement group bundles, and back to ranks."""

from typing import Literal

from cluster.config import RankResources
from parallel.topology import Topology

Bundle = dict[str, float]
Strategy = Literal["STRICT_PACK", "PACK"]

REPLICA_CPUS = 0.5
"""Of bundle 0: the engine thread and the channels of a replica. Small, so that two ranks and their replica fit on few cores."""


def bundles(topology: Topology, resources: RankResources) -> list[Bundle]:
    """Bundle 0 for the replica itself, then one for each rank in order."""
    rank: Bundle = {"CPU": resources.cpus}
    if resources.gpus:
        rank["GPU"] = resources.gpus
    return [{"CPU": REPLICA_CPUS}, *(dict(rank) for _ in range(topology.size))]


def bundle_of(rank: int) -> int:
    return rank + 1


def strategy(resources: RankResources) -> Strategy:
    """All bundles on one host, strictly or as far as possible.

    With PACK Ray fills a host before it takes the next, and ranks are numbered with `tp` fastest, so neighbours on the
    tensor-parallel axis share a host as far as hosts are large enough.
    """
    return "STRICT_PACK" if resources.one_host else "PACK"


def cpus_needed(topology: Topology, resources: RankResources) -> float:
    """CPUs of one replica, all bundles together."""
    return sum(bundle["CPU"] for bundle in bundles(topology, resources))
