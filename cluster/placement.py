"""Maps a topology to the bundles of a Ray placement group, and ranks to bundles."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from cluster.config import RankResources
from parallel.topology import Topology

Bundle = dict[str, float]
Strategy = Literal["STRICT_PACK", "PACK"]

REPLICA_CPUS = 0.5
"""CPUs of bundle 0: for the replica's engine thread and sockets. Few, so that two ranks and their replica fit on few cores."""

HOST_RESOURCE_SHARE = 0.001
"""Amount of `host_resource` to request: the resource marks a kind of host and is not meant to be used up."""


def bundles(topology: Topology, resources: RankResources) -> list[Bundle]:
    """Bundle 0 for the replica itself, then one for each set of neighbouring ranks that must share a host.

    tp=2, pp=2:  [replica] [ranks 0 1] [ranks 2 3]
    """
    kind = on_hosts_with(resources.host_resource)
    together = ranks_together(topology, resources)
    counts = [min(together, topology.size - first) for first in range(0, topology.size, together)]
    gpus = [{"GPU": resources.gpus * count} if resources.gpus else {} for count in counts]
    ranks = [{"CPU": resources.cpus * count, **gpu, **kind} for count, gpu in zip(counts, gpus, strict=True)]
    return [{"CPU": REPLICA_CPUS, **kind}, *ranks]


def ranks_together(topology: Topology, resources: RankResources) -> int:
    """How many neighbouring ranks must share a host: `ranks_per_host`, or else those that all-reduce in every layer, for tensor parallelism
    or within an expert. (Without expert parallelism there usually are no experts.)"""
    shared_expert = topology.expert_tp if topology.ep > 1 else 1
    return resources.ranks_per_host or math.lcm(topology.tp, shared_expert)


def on_hosts_with(resource: str | None) -> Bundle:
    """The resources to request so that Ray places something on a host that has ``resource``."""
    return {} if resource is None else {resource: HOST_RESOURCE_SHARE}


def bundle_of(rank: int, topology: Topology, resources: RankResources) -> int:
    """The index of a rank's bundle in the placement group. Bundle 0 is the replica's own."""
    return 1 + rank // ranks_together(topology, resources)


def strategy(resources: RankResources) -> Strategy:
    """The placement strategy: all bundles on one host, strictly or as far as possible.

    With PACK Ray fills a host before it uses the next one, so pipeline stages and data-parallel groups share hosts that are large enough.
    """
    return "STRICT_PACK" if resources.one_host else "PACK"


def most_on_a_host(most: int, hosts: Sequence[Mapping[str, float]], topology: Topology, resources: RankResources) -> int:
    """How many of ``most`` replicas may have ranks on the same host, by the CPUs of the largest host that can take a bundle of ranks.
    ``hosts``: Ray's resources of each host."""
    ranks = min(bundles(topology, resources)[1:], key=lambda bundle: bundle["CPU"])
    cpus = [host["CPU"] for host in hosts if all(host.get(name, 0) >= amount for name, amount in ranks.items())]
    return min(most, int(max(cpus) // ranks["CPU"])) if cpus and ranks["CPU"] else most


def cpus_needed(topology: Topology, resources: RankResources) -> float:
    """CPUs of one replica: the sum over its bundles."""
    return sum(bundle["CPU"] for bundle in bundles(topology, resources))
