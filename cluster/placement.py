"""Where the ranks of a replica are placed: a topology to Ray placement group bundles, and back to ranks."""

import math
from collections.abc import Mapping, Sequence
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
    """How many neighbouring ranks share a host for certain: those that reduce in every layer, by tensor parallelism or within an
    expert, unless `ranks_per_host` says another number. (Without expert parallelism there mostly are no experts.)"""
    shared_expert = topology.expert_tp if topology.ep > 1 else 1
    return resources.ranks_per_host or math.lcm(topology.tp, shared_expert)


def on_hosts_with(resource: str | None) -> Bundle:
    """What to ask Ray for so that something is placed on a host that has ``resource``."""
    return {} if resource is None else {resource: HOST_RESOURCE_SHARE}


def bundle_of(rank: int, topology: Topology, resources: RankResources) -> int:
    """The bundle of its replica's placement group that a rank has; the first is the replica's own."""
    return 1 + rank // ranks_together(topology, resources)


def strategy(resources: RankResources) -> Strategy:
    """All bundles on one host, strictly or as far as possible.

    Ray fills a host before it takes the next one, so stages and data-parallel groups share hosts as far as these are large enough.
    """
    return "STRICT_PACK" if resources.one_host else "PACK"


def most_on_a_host(most: int, hosts: Sequence[Mapping[str, float]], topology: Topology, resources: RankResources) -> int:
    """How many of ``most`` replicas may have ranks on one host: as the CPUs allow of the largest that can take any. ``hosts``: Ray's
    resources of each."""
    ranks = min(bundles(topology, resources)[1:], key=lambda bundle: bundle["CPU"])
    cpus = [host["CPU"] for host in hosts if all(host.get(name, 0) >= amount for name, amount in ranks.items())]
    return min(most, int(max(cpus) // ranks["CPU"])) if cpus and ranks["CPU"] else most


def cpus_needed(topology: Topology, resources: RankResources) -> float:
    """CPUs of one replica, all bundles together."""
    return sum(bundle["CPU"] for bundle in bundles(topology, resources))
