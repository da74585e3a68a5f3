"""Which hosts the ranks of a replica stand on: a tp group within one host, a stage in as few as it can, stages over hosts.

Where a replica spans hosts, all of them hold the same number of its ranks, as the pods of one worker group do.
"""

from dataclasses import dataclass

from parallel.topology import Topology
from serve.planning.hardware import Fleet


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How one replica lies on hosts, and how many replicas the fleet then has."""

    hosts_per_replica: int
    gpus_per_host: int
    """Of one replica on each of its hosts."""
    replicas: int
    stage_spans_hosts: bool
    """Ranks of one stage stand on several hosts: experts then exchange tokens over the network."""


def place_replica(topology: Topology, fleet: Fleet) -> Placement | None:
    """None where a tp group is larger than a host, a replica larger than the fleet, or hosts would be filled unevenly."""
    per_host = fleet.gpus_per_host
    if topology.size <= per_host:
        replicas = per_host // topology.size * fleet.hosts
        return Placement(hosts_per_replica=1, gpus_per_host=topology.size, replicas=replicas, stage_spans_hosts=False)
    if topology.tp > per_host:
        return None
    stages, groups = _per_host(topology, per_host)
    if topology.pp % stages or topology.dp % groups:
        return None
    hosts = -(-topology.pp // stages) * -(-topology.dp // groups)
    if hosts > fleet.hosts:
        return None
    return Placement(
        hosts_per_replica=hosts,
        gpus_per_host=stages * groups * topology.tp,
        replicas=fleet.hosts // hosts,
        stage_spans_hosts=groups < topology.dp,
    )


def _per_host(topology: Topology, gpus: int) -> tuple[int, int]:
    """How many stages, and how many of a stage's tp groups, one host takes: whole stages where one fits.

    8 GPUs, tp=2 pp=4 dp=2:  2 stages of 2 groups        8 GPUs, tp=4 dp=4:  1 stage, of which 2 groups
    """
    stages = min(topology.pp, gpus // topology.ranks_per_stage)
    return (stages, topology.dp) if stages else (1, gpus // topology.tp)
