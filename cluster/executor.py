"""Step 8 of a request: an executor whose ranks are Ray actors. Plans go to all of them, one of each shard answers."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Never

import ray
import zmq

from cluster.channel import PrivateFolder
from cluster.config import RankResources, ReplicaConfig
from cluster.errors import ChannelError, StartFailed
from cluster.frozen_process import FrozenProcessDetector
from cluster.messages import RankFailed, RankProgress, RankReady, decode, encode
from cluster.placement_group import ReplicaPlacementGroup
from cluster.remote_crash_reports import ask_for_note, fetch_notes
from cluster.root_cause import describe_exit, diagnose_loss
from cluster.worker import Deadlines, RankLauncher, WorkerLocation
from cluster.worker_handles import WorkerHandle, connect_workers, examine_workers, start_workers
from cluster.worker_shutdown import END_S, shut_down_workers
from engine.errors import WorkersLost
from engine.executor import Capacity
from engine.failpoints import hit
from engine.plan import StepPlan, StepResult
from engine.request_trace import trace_place
from engine.shard_results import ShardResults

logger = logging.getLogger(__name__)

POLL_MS = 50
"""How soon a death that Ray reports is noticed by who waits for a step."""
DIAGNOSIS_S = 0.5
"""After the first sign of a loss, how long to listen for the others: a killed rank makes its peers raise, often sooner than
its own death is known."""


class RayExecutor:
    """The ranks of one replica as Ray actors of its placement group.

    Raises `StartFailed` where the ranks cannot be started; `on_loss` is called from another thread as soon as a rank is
    known to have ended, also while no step is under way.
    """

    def __init__(
        self,
        *,
        ranks: RankLauncher,
        resources: RankResources,
        config: ReplicaConfig,
        placement_group: ReplicaPlacementGroup,
        folder: PrivateFolder,
        on_progress: Callable[[RankProgress], None] = lambda _progress: None,
        on_loss: Callable[[], None] = lambda: None,
        examine: bool = True,
    ) -> None:
        """``examine``: look at the hosts before anything is loaded, and raise UnfitHosts if that cannot end well."""
        self._config, self._on_progress, self._on_loss = config, on_progress, on_loss
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._workers: list[WorkerHandle] = []
        self._answers = ShardResults(ranks.topology.dp)
        self._last_step: int | None = None
        self._deadline_s = config.first_step_timeout_s
        self._broken = False
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="rank-watcher", daemon=True)
        try:
            start_workers(self._workers, ranks, resources, placement_group, folder, self._context)
            connect_workers(self._workers, silence_s=config.host_silence_s)
            if examine:
                examine_workers(self._workers, ranks)
            self._listen_to_all()
            self._capacity = self._load(ranks)
        except BaseException:
            self.close()
            raise

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def locations(self) -> tuple[WorkerLocation, ...]:
        return tuple(worker.location for worker in self._workers if worker.location is not None)

    def submit(self, plan: StepPlan) -> "PendingRayStep":
        trace_place(8, f"step-{plan.step}")
        hit("executor.submit")
        raw = encode(plan)
        self._last_step = plan.step
        for worker in self._workers:
            try:
                worker.socket.send(raw, zmq.NOBLOCK)
            except zmq.Again:
                self._lose(f"{worker.name} takes no more plans")
        return PendingRayStep(self, plan.step)

    def close(self) -> None:
        """End the ranks: by asking those that still listen, then by force. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        healthy = not self._broken and not self._ended.is_set()
        listening = healthy and all(worker.capacity is not None for worker in self._workers)
        shut_down_workers(self._workers, listening=listening, broken=self._broken)
        if self._watcher.ident is not None:
            self._watcher.join(END_S)
        self._context.destroy(linger=0)

    # --- starting

    def _listen_to_all(self) -> None:
        for worker in self._workers:
            self._poller.register(worker.socket, zmq.POLLIN)
            if worker.beats is not None:
                self._poller.register(worker.beats, zmq.POLLIN)

    def _load(self, ranks: RankLauncher) -> Capacity:
        """Have every rank load its share, and wait until all are ready."""
        locations = self.locations
        meeting = f"tcp://{locations[0].ip}:{locations[0].free_port}" if len(locations) > 1 else None
        self._frozen = FrozenProcessDetector(
            {worker.rank: worker.location.pid for worker in self._workers if worker.process is not None and worker.location is not None},
            self._config.freeze_timeout_s,
        )
        deadlines = Deadlines(
            start_s=self._config.start_timeout_s,
            first_step_s=self._config.first_step_timeout_s + END_S,
            step_s=self._config.step_timeout_s + END_S,
        )
        for worker, place in zip(self._workers, locations, strict=True):
            on_host = sum(other.node == place.node for other in locations)
            worker.life = worker.actor.serve.remote(ranks=ranks, rendezvous=meeting, ranks_on_host=on_host, deadlines=deadlines)
        self._watcher.start()
        heard = time.monotonic()
        while any(worker.capacity is None for worker in self._workers):
            try:
                heard = time.monotonic() if self._listen() else heard
                self._look_for_frozen()
                if time.monotonic() - heard > self._config.start_timeout_s:
                    self._lose(f"no rank got further within {self._config.start_timeout_s:g} s")
            except WorkersLost as loss:
                raise StartFailed(f"{loss}\n{loss.rank_traceback or ''}".rstrip()) from loss
        capacities = [worker.capacity for worker in self._workers if worker.capacity is not None]
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
            self._look_for_frozen()
            if time.monotonic() > deadline:
                self._lose(f"step {step} was not answered within {self._deadline_s:g} s")

    def _listen(self) -> bool:
        """Take what the ranks have sent, waiting a little for it. Raises WorkersLost on a sign of loss."""
        heard = self._receive(POLL_MS)
        if self._ended.is_set() or any(worker.failure or worker.silent for worker in self._workers):
            self._lose(None)
        return heard

    def _look_for_frozen(self) -> None:
        if (rank := self._frozen.frozen()) is not None:
            self._lose(f"rank {rank} stood still for {self._config.freeze_timeout_s:g} s")

    def _receive(self, timeout_ms: int) -> bool:
        ready = dict(self._poller.poll(timeout_ms))
        for worker in self._workers:
            if worker.socket in ready:
                try:
                    self._take(worker, decode(worker.socket.recv()))
                except ChannelError as error:  # whatever it meant to say, its steps can no longer be relied on
                    host = worker.location.host if worker.location else ""
                    worker.failure = worker.failure or RankFailed(worker.rank, host, self._last_step, str(error), traceback="")
            if worker.beats is not None and worker.beats in ready:
                worker.silent = True
                self._poller.unregister(worker.beats)
        return bool(ready)

    def _take(self, worker: WorkerHandle, message: object) -> None:
        match message:
            case StepResult():
                self._answers.put(message)
            case RankProgress():
                self._on_progress(message)
            case RankReady():
                worker.capacity = message.capacity
            case RankFailed():
                worker.failure = message
            case _:
                logger.warning("%s sent an unexpected %s", worker.name, type(message).__name__)

    # --- losing

    def _watch(self) -> None:
        """Note every rank that ends; Ray reports a killed process within some 20 ms."""
        living = {worker.life: worker for worker in self._workers}
        while living and not self._closing.is_set():
            ended, _ = ray.wait(list(living), num_returns=1, timeout=0.2)
            if self._closing.is_set():  # how one ended that was ended here nobody asks, and Ray takes seconds to say
                return
            for life in ended:
                worker = living.pop(life)
                worker.ended = describe_exit(life)
                ask_for_note(worker)
            if ended and not self._closing.is_set():
                self._ended.set()
                self._on_loss()

    def _lose(self, symptom: str | None) -> Never:
        """Listen for what else is to be heard, and raise WorkersLost with the rank to blame."""
        self._broken = True
        deadline = time.monotonic() + DIAGNOSIS_S
        while time.monotonic() < deadline:
            self._receive(POLL_MS)
        fetch_notes(self._workers)
        raise diagnose_loss(self._workers, self._last_step, symptom)


class PendingRayStep:
    """A step that the ranks are computing."""

    def __init__(self, executor: RayExecutor, step: int) -> None:
        self._executor, self._step = executor, step

    def result(self) -> StepResult:
        return self._executor.wait_for(self._step)
