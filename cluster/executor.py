"""Step 8 of a request: an executor whose ranks are Ray actors. Plans go to all of them, one of each shard answers."""

import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import zmq
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster import placement
from cluster.blame import how_it_ended, is_about_peers
from cluster.channel import PrivateFolder, new_keys, reach
from cluster.config import RankResources, ReplicaConfig
from cluster.doctor.findings import Severity
from cluster.doctor.in_cluster import survey_actors
from cluster.errors import ChannelError, HostUnreachable, StartFailed, UnfitHosts
from cluster.far_end import KNOCK_S, FarEnd, keep_hearing, knock
from cluster.frozen import FrozenWatch, is_stopped
from cluster.messages import RankFailed, RankProgress, RankReady, Stop, decode, encode
from cluster.worker import Deadlines, Place, Ranks, Worker, end_process, page_beside
from engine.answers import StepAnswers
from engine.errors import WorkersLost
from engine.executor import Capacity
from engine.failpoints import hit
from engine.places import mark
from engine.plan import StepPlan, StepResult
from parallel.last_collective import read as last_collective

logger = logging.getLogger(__name__)

POLL_MS = 50
"""How soon a death that Ray reports is noticed by who waits for a step."""
BLAME_S = 0.5
"""After the first sign of a loss, how long to listen for the others: a killed rank makes its peers raise, often sooner than
its own death is known."""
END_S = 5.0
"""How long ranks may take to end."""
KILL_S = 1.0
"""How long healthy ranks may take to end once Ray kills them, before the kernel does."""
OPEN_S = 120.0
"""How long Ray may take to start the worker processes."""


class Ground:
    """The placement group that a replica stands on: that of the actor it runs in, or its own."""

    def __init__(self, group: PlacementGroup, *, owned: bool) -> None:
        self.group, self._owned = group, owned

    @classmethod
    def here_or_new(cls, ranks: Ranks, resources: RankResources, *, timeout_s: float) -> "Ground":
        """The current actor's group, if it was made by `placement.bundles`, else a new one.

        Raises:
            StartFailed: the cluster has not the resources.
        """
        current = get_current_placement_group()
        if current is not None:
            return cls(current, owned=False)
        wanted = placement.bundles(ranks.topology, resources)
        group = placement_group(wanted, strategy=placement.strategy(resources))
        if not group.wait(timeout_s):
            remove_placement_group(group)
            raise StartFailed(f"the cluster could not set aside {wanted} within {timeout_s:g} s; it has {ray.cluster_resources()}")
        return cls(group, owned=True)

    def close(self) -> None:
        if self._owned:
            remove_placement_group(self.group)
            self._owned = False


@dataclass
class _Seat:
    """One rank as its executor sees it."""

    rank: int
    actor: Any
    socket: "zmq.Socket[bytes]"
    ipc: str
    """Where it listens if it is on this host."""
    place: Place | None = None
    life: Any = None
    """ObjectRef of the call that lasts as long as the rank."""
    process: int | None = None
    """pidfd of a rank on this host."""
    beats: "zmq.Socket[Any] | None" = None
    """Of a rank on another host: readable once it is not heard any more; see `cluster.far_end`."""
    silent: bool = False
    ended: str | None = None
    """How Ray says that it ended."""
    failure: RankFailed | None = None
    """What it said itself."""
    capacity: Capacity | None = None

    @property
    def name(self) -> str:
        if self.place is None:
            return f"rank {self.rank}"
        return f"rank {self.rank} on {self.place.host} (pid {self.place.pid})"


class RayExecutor:
    """The ranks of one replica as Ray actors of its placement group.

    Raises `StartFailed` where the ranks cannot be started; `on_loss` is called from another thread as soon as a rank is
    known to have ended, also while no step is under way.
    """

    def __init__(
        self,
        *,
        ranks: Ranks,
        resources: RankResources,
        config: ReplicaConfig,
        ground: Ground,
        folder: PrivateFolder,
        on_progress: Callable[[RankProgress], None] = lambda _progress: None,
        on_loss: Callable[[], None] = lambda: None,
        examine: bool = True,
    ) -> None:
        """``examine``: look at the hosts before anything is loaded, and raise UnfitHosts if that cannot end well."""
        self._config, self._on_progress, self._on_loss = config, on_progress, on_loss
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._seats: list[_Seat] = []
        self._answers = StepAnswers(ranks.topology.dp)
        self._last_step: int | None = None
        self._deadline_s = config.first_step_timeout_s
        self._broken = False
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="rank-watcher", daemon=True)
        try:
            self._open(ranks, resources, ground, folder)
            if examine:
                self._examine(ranks)
            self._capacity = self._start(ranks)
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(seat.place for seat in self._seats if seat.place is not None)

    @property
    def last_step(self) -> int | None:
        """Number of the step submitted last."""
        return self._last_step

    def submit(self, plan: StepPlan) -> "PendingRayStep":
        mark(8, f"step-{plan.step}")
        hit("executor.submit")
        raw = encode(plan)
        self._last_step = plan.step
        for seat in self._seats:
            try:
                seat.socket.send(raw, zmq.NOBLOCK)
            except zmq.Again:
                self._lose(f"{seat.name} takes no more plans")
        return PendingRayStep(self, plan.step)

    def close(self) -> None:
        """End the ranks: by asking those that still listen, then by force. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._ask_to_stop()
        for seat in self._seats:
            ray.kill(seat.actor, no_restart=True)
        if not self._broken:
            self._await_ends(KILL_S)
        for seat in self._seats:
            self._force(seat)
        self._await_ends(END_S)
        for seat in self._seats:
            page_beside(seat.ipc).unlink(missing_ok=True)
            if seat.process is not None:
                os.close(seat.process)
                seat.process = None
        if self._watcher.ident is not None:
            self._watcher.join(END_S)
        self._context.destroy(linger=0)

    # --- starting

    def _open(self, ranks: Ranks, resources: RankResources, ground: Ground, folder: PrivateFolder) -> None:
        """Start the worker processes and connect to them."""
        node = ray.get_runtime_context().get_node_id()
        keys = new_keys()
        actor_class = ray.remote(Worker)
        token = os.urandom(4).hex()
        for rank in range(ranks.topology.size):
            actor = actor_class.options(
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(ground.group, placement.bundle_of(rank, ranks.topology, resources)),
            ).remote(rank)
            self._seats.append(_Seat(rank, actor, self._context.socket(zmq.PAIR), folder.socket(f"{token}-{rank}")))
        opening = [
            seat.actor.open.remote(replica_node=node, ipc=seat.ipc, replica_key=keys.public, silence_s=self._config.host_silence_s)
            for seat in self._seats
        ]
        try:
            places = ray.get(opening, timeout=OPEN_S)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise StartFailed(f"the worker processes did not start: {error}") from error
        for seat, place in zip(self._seats, places, strict=True):
            seat.place = place
            if place.node != node:
                seat.beats = keep_hearing(seat.socket, self._config.host_silence_s)
                self._poller.register(seat.beats, zmq.POLLIN)
            reach(seat.socket, place.address, node=node, keys=keys)
            self._poller.register(seat.socket, zmq.POLLIN)
            if place.node == node:
                try:
                    seat.process = os.pidfd_open(place.pid)
                except OSError as error:  # mostly that it ended since it answered
                    raise StartFailed(f"{seat.name} is not there any more: {error}") from error

    def _examine(self, ranks: Ranks) -> None:
        """`manta doctor`'s quick checks, in the very processes that are to load. What is fatal names its host."""
        try:
            survey = survey_actors([seat.actor for seat in self._seats], ranks.need, lambda actor: actor.examine.remote(ranks))
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise StartFailed(f"the worker processes could not be examined: {error}") from error
        fatal = [finding for finding in survey.findings if finding.severity is Severity.FATAL]
        if fatal:
            raise UnfitHosts("\n".join(map(str, fatal)))
        for finding in survey.findings:
            logger.log(logging.WARNING if finding.severity is Severity.WARNING else logging.INFO, "%s", finding)

    def _start(self, ranks: Ranks) -> Capacity:
        """Have every rank load its share, and wait until all are ready."""
        places = self.places
        meeting = f"tcp://{places[0].ip}:{places[0].free_port}" if len(places) > 1 else None
        self._frozen = FrozenWatch(
            {seat.rank: seat.place.pid for seat in self._seats if seat.process is not None and seat.place is not None},
            self._config.freeze_timeout_s,
        )
        deadlines = Deadlines(
            start_s=self._config.start_timeout_s,
            first_step_s=self._config.first_step_timeout_s + END_S,
            step_s=self._config.step_timeout_s + END_S,
        )
        for seat, place in zip(self._seats, places, strict=True):
            on_host = sum(other.node == place.node for other in places)
            seat.life = seat.actor.serve.remote(ranks=ranks, rendezvous=meeting, ranks_on_host=on_host, deadlines=deadlines)
        self._watcher.start()
        heard = time.monotonic()
        while any(seat.capacity is None for seat in self._seats):
            try:
                heard = time.monotonic() if self._listen() else heard
                if (rank := self._frozen.frozen()) is not None:
                    self._lose(f"rank {rank} stood still for {self._config.freeze_timeout_s:g} s")
                if time.monotonic() - heard > self._config.start_timeout_s:
                    self._lose(f"no rank got further within {self._config.start_timeout_s:g} s")
            except WorkersLost as loss:
                raise StartFailed(f"{loss}\n{loss.rank_traceback or ''}".rstrip()) from loss
        capacities = [seat.capacity for seat in self._seats if seat.capacity is not None]
        return min(capacities, key=lambda capacity: capacity.num_blocks)

    # --- running

    def wait_for(self, step: int) -> StepResult:
        """The result of ``step``; see `PendingStep.result`."""
        deadline = time.monotonic() + self._deadline_s
        while True:
            if (result := self._answers.take(step)) is not None:
                self._deadline_s = self._config.step_timeout_s
                return result
            self._listen()
            if (rank := self._frozen.frozen()) is not None:
                self._lose(f"rank {rank} stood still for {self._config.freeze_timeout_s:g} s")
            if time.monotonic() > deadline:
                self._lose(f"step {step} was not answered within {self._deadline_s:g} s")

    def _listen(self) -> bool:
        """Take what the ranks have sent, waiting a little for it. Raises WorkersLost on a sign of loss."""
        heard = self._receive(POLL_MS)
        if self._ended.is_set() or any(seat.failure or seat.silent for seat in self._seats):
            self._lose(None)
        return heard

    def _receive(self, timeout_ms: int) -> bool:
        ready = dict(self._poller.poll(timeout_ms))
        for seat in self._seats:
            if seat.socket in ready:
                try:
                    self._take(seat, decode(seat.socket.recv()))
                except ChannelError as error:  # whatever it meant to say, its steps can no longer be relied on
                    host = seat.place.host if seat.place else ""
                    seat.failure = seat.failure or RankFailed(seat.rank, host, self._last_step, str(error), traceback="")
            if seat.beats is not None and seat.beats in ready:
                seat.silent = True
                self._poller.unregister(seat.beats)
        return bool(ready)

    def _take(self, seat: _Seat, message: object) -> None:
        match message:
            case StepResult():
                self._answers.put(message)
            case RankProgress():
                self._on_progress(message)
            case RankReady():
                seat.capacity = message.capacity
            case RankFailed():
                seat.failure = message
            case _:
                logger.warning("%s sent an unexpected %s", seat.name, type(message).__name__)

    # --- losing

    def _watch(self) -> None:
        """Note every rank that ends; Ray reports a killed process within some 20 ms."""
        living = {seat.life: seat for seat in self._seats}
        while living and not self._closing.is_set():
            ended, _ = ray.wait(list(living), num_returns=1, timeout=0.2)
            if self._closing.is_set():  # how one ended that was ended here nobody asks, and Ray takes seconds to say
                return
            for life in ended:
                living.pop(life).ended = how_it_ended(life)
            if ended and not self._closing.is_set():
                self._ended.set()
                self._on_loss()

    def _lose(self, symptom: str | None) -> None:
        """Find the rank to blame and raise WorkersLost."""
        self._broken = True
        deadline = time.monotonic() + BLAME_S
        while time.monotonic() < deadline:
            self._receive(POLL_MS)
        culprit, cause = self._blame()
        step = f" in step {self._last_step}" if self._last_step is not None else " while starting"
        if culprit is None:
            raise WorkersLost(f"the ranks were lost{step}: {symptom}", last_collectives=self._last_collectives())
        said = culprit.failure
        kind = HostUnreachable if cause == FarEnd.HOST_GONE.value else WorkersLost
        raise kind(
            f"{culprit.name} was lost{step}: {cause}" + (f" ({symptom})" if symptom else ""),
            rank=culprit.rank,
            host=culprit.place.host if culprit.place else None,
            rank_traceback=said.traceback if said else None,
            last_collectives=self._last_collectives(),
        )

    def _last_collectives(self) -> tuple[str, ...]:
        """Of the ranks of this host: dead or stopped, they have left a page each."""
        known = ((seat, last_collective(page_beside(seat.ipc))) for seat in self._seats)
        return tuple(f"rank {seat.rank}: {last}" for seat, last in known if last is not None)

    def _blame(self) -> tuple[_Seat | None, str]:
        """A rank that ended, or fell silent, without a word is the cause, one that raised may be its victim; then one that stands still."""
        for seat in self._seats:
            if seat.ended and not seat.failure:
                return seat, seat.ended
        for seat in self._seats:
            if seat.silent and not seat.failure and seat.place is not None and seat.place.address.tcp is not None:
                return seat, knock(seat.place.address.tcp, KNOCK_S).value
        raised = [seat for seat in self._seats if seat.failure]
        for seat in sorted(raised, key=lambda seat: is_about_peers(seat.failure)):
            assert seat.failure is not None
            return seat, seat.failure.message
        for seat in self._seats:
            if seat.process is not None and seat.place is not None and is_stopped(seat.place.pid):
                return seat, "its process is stopped (SIGSTOP or a debugger)"
        return None, ""

    # --- ending

    def _ask_to_stop(self) -> None:
        """Let healthy ranks leave their loop, close their groups and free their shared memory."""
        if self._broken or self._ended.is_set() or any(seat.capacity is None for seat in self._seats):
            return
        for seat in self._seats:
            with contextlib.suppress(zmq.Again):  # its pipe is full of plans that it does not take: it is killed like one that is deaf
                seat.socket.send(encode(Stop()), zmq.NOBLOCK)
        lives = [seat.life for seat in self._seats]
        ray.wait(lives, num_returns=len(lives), timeout=END_S)

    def _await_ends(self, within_s: float) -> None:
        """Wait for the processes on this host."""
        deadline = time.monotonic() + within_s
        for seat in self._seats:
            if seat.process is not None:
                select.select([seat.process], [], [], max(0.0, deadline - time.monotonic()))

    def _force(self, seat: _Seat) -> None:
        """A frozen or busily waiting process does not hear Ray."""
        if seat.process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(seat.process, signal.SIGKILL)
        elif seat.place is not None and not seat.ended:
            there = NodeAffinitySchedulingStrategy(seat.place.node, soft=False)
            ray.remote(end_process).options(num_cpus=0, scheduling_strategy=there).remote(seat.place.pid, seat.place.started)


class PendingRayStep:
    """A step that the ranks are computing."""

    def __init__(self, executor: RayExecutor, step: int) -> None:
        self._executor, self._step = executor, step

    def result(self) -> StepResult:
        return self._executor.wait_for(self._step)
