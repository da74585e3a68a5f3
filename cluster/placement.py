"""Where the ranks of a replica are placed: a topology to Ray placement group bundles, and back to ranks."""

from typing import Literal

from cluster.config import RankResources
from parallel.topology import Topology

Bundle = dict[str, float]
Strategy = Literal["STRICT_PACK", "PACK"]

REPLICA_CPUS = 0.5
"""Of bundle 0: the engine thread and the channels of a replica. Small, so that two ranks and their replica fit on few cores."""

HOST_RESOURCE_SHARE = 0.001
"""Of a host's `host_resource`, for whatever must be on such a host: it marks a kind of host and does not count anything."""


def bundles(topology: Topology, resources: RankResources) -> list[Bundle]:
    """Bundle 0 for the replica itself, then one for each rank in order."""
    kind = on_hosts_with(resources.host_resource)
    rank: Bundle = {"CPU": resources.cpus, **kind}
    if resources.gpus:
        rank["GPU"] = resources.gpus
    return [{"CPU": REPLICA_CPUS, **kind}, *(dict(rank) for _ in range(topology.size))]


def on_hosts_with(resource: str | None) -> Bundle:
    """What to ask Ray for so that something is placed on a host that has ``resource``."""
    return {} if resource is None else {resource: HOST_RESOURCE_SHARE}


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
