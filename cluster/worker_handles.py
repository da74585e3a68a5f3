"""Start the workers of a replica: one Ray actor per rank, connected by a socket, its host checked before it loads the model."""

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
"""Timeout for Ray to start the worker processes."""


@dataclass
class WorkerHandle:
    """What an executor keeps about one rank."""

    rank: int
    actor: Any
    socket: "zmq.Socket[bytes]"
    ipc: str
    """The endpoint on which it listens if it is on this host."""
    location: WorkerLocation | None = None
    serve_call: Any = None
    """ObjectRef of its `Worker.serve` call, which ends with the rank."""
    pidfd: int | None = None
    """A pidfd of its process, if that is on this host."""
    disconnect_monitor: "zmq.Socket[Any] | None" = None
    """For a rank on another host: a socket that becomes readable once the connection is lost; see `cluster.peer_liveness`."""
    is_silent: bool = False
    """Whether that connection is lost."""
    exit_reason: str | None = None
    """Why its process ended, according to Ray."""
    crash_report_call: Any = None
    """ObjectRef of the task that fetches its crash report, once requested."""
    crash_report: str | None = None
    """The crash report of a rank on another host; see `cluster.remote_crash_reports`."""
    failure: RankFailed | None = None
    """The exception that it reported itself."""
    capacity: Capacity | None = None

    @property
    def has_ended(self) -> bool:
        """Whether its process is gone. For a process on this host the kernel knows it before Ray does."""
        return bool(self.exit_reason or (self.pidfd is not None and select.select([self.pidfd], [], [], 0)[0]))

    @property
    def name(self) -> str:
        if self.location is None:
            return f"rank {self.rank}"
        return f"rank {self.rank} on {self.location.host} (pid {self.location.pid})"


def start_workers(
    workers: list[WorkerHandle],
    launcher: RankLauncher,
    resources: RankResources,
    placement_group: ReplicaPlacementGroup,
    folder: PrivateFolder,
    context: "zmq.Context[zmq.Socket[bytes]]",
) -> None:
    """Have Ray start a worker for every rank, without waiting for them.

    Each is added to ``workers`` at once, so that the caller can end those that were started if a later one fails.
    """
    actor_class = ray.remote(Worker)
    token = os.urandom(4).hex()
    for rank in range(launcher.topology.size):
        actor = actor_class.options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus or 0,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group.group, placement.bundle_of(rank, launcher.topology, resources)
            ),
        ).remote(rank)
        workers.append(WorkerHandle(rank, actor, context.socket(zmq.PAIR), folder.socket(f"{token}-{rank}")))


def connect_workers(workers: Sequence[WorkerHandle], *, silence_s: float) -> None:
    """Wait for the workers and connect to them. ``silence_s``: for how long a worker on another host may be silent.

    Raises:
        StartFailed: a worker process did not start, or ended at once.
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
    for worker, location in zip(workers, locations, strict=True):
        worker.location = location
        if location.node != node:
            worker.disconnect_monitor = enable_heartbeats(worker.socket, silence_s)
        connect(worker.socket, location.address, node=node, keys=keys)
        if location.node == node:
            try:
                worker.pidfd = os.pidfd_open(location.pid)
            except OSError as error:  # usually because it ended after it answered
                raise StartFailed(f"{worker.name} is not there any more: {error}") from error


def examine_workers(workers: Sequence[WorkerHandle], launcher: RankLauncher) -> None:
    """Run the quick checks of `manta doctor` in the processes that are about to load the model.

    Raises:
        UnfitHosts: a check failed fatally; the message lists the findings by host.
        StartFailed: a worker did not answer.
    """
    try:
        survey = survey_actors([worker.actor for worker in workers], launcher.need, lambda actor: actor.examine.remote(launcher))
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
        raise StartFailed(f"the worker processes could not be examined: {error}") from error
    fatal = [finding for finding in survey.findings if finding.severity is Severity.FATAL]
    if fatal:
        raise UnfitHosts("\n".join(map(str, fatal)))
    for finding in survey.findings:
        logger.log(logging.WARNING if finding.severity is Severity.WARNING else logging.INFO, "%s", finding)
