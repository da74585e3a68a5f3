"""Place the ranks of a replica on hosts: a tp group within one host, a stage on as few hosts as possible, stages across hosts.

If a replica spans hosts, each of them holds the same number of its ranks, like the pods of one worker group.
"""

from dataclasses import dataclass

from parallel.topology import Topology
from serve.planning.hardware import Fleet


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How one replica is placed on hosts, and how many replicas fit on the fleet."""

    hosts_per_replica: int
    gpus_per_host: int
    """GPUs of one replica on each of its hosts."""
    replicas: int
    stage_spans_hosts: bool
    """Whether ranks of one stage are on several hosts; experts then exchange tokens over the network."""


def place_replica(topology: Topology, fleet: Fleet) -> Placement | None:
    """None if a tp group exceeds a host, a replica exceeds the fleet, or hosts would hold different numbers of ranks."""
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
    """(stages, tp groups of a stage) per host; whole stages if one fits.

    8 GPUs, tp=2 pp=4 dp=2:  2 stages of 2 groups        8 GPUs, tp=4 dp=4:  1 stage, of which 2 groups
    """
    stages = min(topology.pp, gpus // topology.ranks_per_stage)
    return (stages, topology.dp) if stages else (1, gpus // topology.tp)
