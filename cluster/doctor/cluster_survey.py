"""Examines the hosts of a Ray cluster: in the workers of a replica, or in actors placed like the ranks of a replica."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import placement
from cluster.config import RankResources
from cluster.doctor.facts import Need
from cluster.doctor.findings import Finding, Severity
from cluster.doctor.survey import Examined, HostCheck, Survey, communication_failure, examine_rank, judge, measure
from engine.counted import counted
from parallel.topology import Topology
from parallel.user_cache import cache_folder

EXAMINE_S = 60.0
MEASURE_S = 180.0
PLACE_S = 60.0


def survey_actors(actors: Sequence[Any], need: Need, ask: Callable[[Any], Any]) -> Survey:
    """Gather the facts of every actor's process and run the checks. ``ask`` makes the remote call, which returns `Examined`.

    Raises:
        ray.exceptions.RayError, GetTimeoutError: an actor did not answer.
    """
    asked_s = time.time()
    examined: list[Examined] = ray.get([ask(actor) for actor in actors], timeout=EXAMINE_S)
    return judge(examined, need, asked_s=asked_s, answered_s=time.time())


def survey_cluster(topology: Topology, resources: RankResources, need: Need, *, host_check: HostCheck | None) -> Survey:
    """Examine the hosts where a replica of this layout would be placed now, and the links between its ranks. Needs a joined Ray cluster."""
    group = placement_group(placement.bundles(topology, resources), strategy=placement.strategy(resources))
    try:
        if not group.wait(PLACE_S):
            return Survey(facts=(), findings=(_no_room(topology, resources),))
        actor_class = ray.remote(Examiner)
        actors = [
            actor_class.options(
                num_cpus=resources.cpus,
                num_gpus=resources.gpus or 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement.bundle_of(rank, topology, resources)),
            ).remote(rank)
            for rank in range(topology.size)
        ]
        survey = survey_actors(actors, need, lambda actor: actor.examine.remote(host_check))
        return _measured(survey, actors, topology, need) if topology.size > 1 else survey
    finally:
        remove_placement_group(group)


class Examiner:
    """An actor that is placed like a rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def examine(self, host_check: HostCheck | None) -> Examined:
        return examine_rank(self._rank, ray.util.get_node_ip_address(), cache_folder(), host_check)

    def find_rendezvous(self) -> tuple[str, int]:
        """A free address on this host for the rendezvous of the ranks."""
        from parallel.groups import free_rendezvous

        meeting = free_rendezvous(ray.util.get_node_ip_address())
        return meeting.host, meeting.port

    def measure(self, topology: Topology, host: str, port: int, device: str, hosts: tuple[str, ...]) -> list[Finding]:
        return measure(topology, self._rank, host, port, device, hosts)


def _measured(survey: Survey, actors: Sequence[Any], topology: Topology, need: Need) -> Survey:
    host, port = ray.get(actors[0].find_rendezvous.remote(), timeout=EXAMINE_S)
    hosts = tuple(each.host for each in survey.facts)
    calls = [actor.measure.remote(topology, host, port, need.device, hosts) for actor in actors]
    findings: list[Finding] = []
    for each, call in zip(survey.facts, calls, strict=True):
        try:
            measured = ray.get(call, timeout=MEASURE_S)
            findings.extend(measured if each.rank == 0 else ())
        except Exception as error:  # Ray's, or the rank's
            findings.append(communication_failure(each.host, each.rank, unwrap_ray_error(error)))
    return survey.with_findings(findings)


def unwrap_ray_error(error: Exception) -> Exception:
    """The exception that an actor raised, without what Ray adds to it: an address, colours and a traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


def _no_room(topology: Topology, resources: RankResources) -> Finding:
    wanted = f"{counted(topology.size, 'rank')} of {resources.cpus:g} CPU and {resources.gpus or 0:g} GPU"
    have = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
    return Finding(
        severity=Severity.FATAL,
        check="placement",
        host=None,
        found=f"the cluster cannot set aside {wanted}; free are {have}",
        todo="add hosts, end what runs there (`ray status` lists it), or choose fewer ranks",
    )
