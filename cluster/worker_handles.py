"""Step 8 of a request, the start: a Ray actor for each rank of a replica, reached by a socket, its host looked at before it loads."""

import logging
import os
import select
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import zmq
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import placement
from cluster.channel import PrivateFolder, connect, new_keys
from cluster.config import RankResources
from cluster.doctor.cluster_survey import survey_actors
from cluster.doctor.findings import Severity
from cluster.errors import StartFailed, UnfitHosts
from cluster.messages import RankFailed
from cluster.peer_liveness import enable_heartbeats
from cluster.placement_group import ReplicaPlacementGroup
from cluster.worker import RankLauncher, Worker, WorkerLocation
from engine.executor import Capacity

logger = logging.getLogger(__name__)

OPEN_S = 120.0
"""How long Ray may take to start the worker processes."""


@dataclass
class WorkerHandle:
    """One rank as its executor sees it."""

    rank: int
    actor: Any
    socket: "zmq.Socket[bytes]"
    ipc: str
    """Where it listens if it is on this host."""
    location: WorkerLocation | None = None
    life: Any = None
    """ObjectRef of the call that lasts as long as the rank."""
    process: int | None = None
    """pidfd of a rank on this host."""
    beats: "zmq.Socket[Any] | None" = None
    """Of a rank on another host: readable once it is not heard any more; see `cluster.peer_liveness`."""
    silent: bool = False
    ended: str | None = None
    """How Ray says that it ended."""
    asked: Any = None
    """ObjectRef of its note, once that was asked for."""
    note: str | None = None
    """Of one on another host: what it left there when it crashed; see `cluster.remote_crash_reports`."""
    failure: RankFailed | None = None
    """What it said itself."""
    capacity: Capacity | None = None

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone: of one on this host the kernel says so before Ray does."""
        return bool(self.ended or (self.process is not None and select.select([self.process], [], [], 0)[0]))

    @property
    def name(self) -> str:
        if self.location is None:
            return f"rank {self.rank}"
        return f"rank {self.rank} on {self.location.host} (pid {self.location.pid})"


def start_workers(
    workers: list[WorkerHandle],
    ranks: RankLauncher,
    resources: RankResources,
    placement_group: ReplicaPlacementGroup,
    folder: PrivateFolder,
    context: "zmq.Context[zmq.Socket[bytes]]",
) -> None:
    """Have Ray start a worker for every rank, and add it to ``workers`` at once: whatever fails, those are there to be ended. They are not
    waited for."""
    actor_class = ray.remote(Worker)
    token = os.urandom(4).hex()
    for rank in range(ranks.topology.size):
        actor = actor_class.options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus or 0,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group.group, placement.bundle_of(rank, ranks.topology, resources)
            ),
        ).remote(rank)
        workers.append(WorkerHandle(rank, actor, context.socket(zmq.PAIR), folder.socket(f"{token}-{rank}")))


def connect_workers(workers: Sequence[WorkerHandle], *, silence_s: float) -> None:
    """Wait for the workers, and connect to them. ``silence_s``: for how long at most one on another host may not be heard.

    Raises:
        StartFailed
    """
    node = ray.get_runtime_context().get_node_id()
    keys = new_keys()
    opening = [
        worker.actor.open.remote(replica_node=node, ipc=worker.ipc, replica_key=keys.public, silence_s=silence_s) for worker in workers
    ]
    try:
        locations = ray.get(opening, timeout=OPEN_S)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise StartFailed(f"the worker processes did not start: {error}") from error
    for worker, place in zip(workers, locations, strict=True):
        worker.location = place
        if place.node != node:
            worker.beats = enable_heartbeats(worker.socket, silence_s)
        connect(worker.socket, place.address, node=node, keys=keys)
        if place.node == node:
            try:
                worker.process = os.pidfd_open(place.pid)
            except OSError as error:  # mostly that it ended since it answered
                raise StartFailed(f"{worker.name} is not there any more: {error}") from error


def examine_workers(workers: Sequence[WorkerHandle], ranks: RankLauncher) -> None:
    """`manta doctor`'s quick checks, in the very processes that are to load.

    Raises:
        UnfitHosts: what cannot end well, by host.
        StartFailed: a worker did not answer.
    """
    try:
        survey = survey_actors([worker.actor for worker in workers], ranks.need, lambda actor: actor.examine.remote(ranks))
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise StartFailed(f"the worker processes could not be examined: {error}") from error
    fatal = [finding for finding in survey.findings if finding.severity is Severity.FATAL]
    if fatal:
        raise UnfitHosts("\n".join(map(str, fatal)))
    for finding in survey.findings:
        logger.log(logging.WARNING if finding.severity is Severity.WARNING else logging.INFO, "%s", finding)
