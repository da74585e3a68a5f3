"""Place 8 of a request: the executor whose ranks are Ray actors. It sends each plan to every rank and collects one result per shard."""

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
from cluster.remote_crash_reports import fetch_crash_reports, request_crash_report
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
"""How soon a caller that waits for a step notices a death that Ray has reported."""
DIAGNOSIS_S = 0.5
"""How long to collect further symptoms after the first sign of a loss: a killed rank makes its peers raise, often before its own death
is known."""


class RayExecutor:
    """Runs the ranks of one replica as Ray actors in its placement group.

    The constructor starts them and raises `StartFailed` if that fails. ``on_loss`` is called from another thread as soon as a rank
    is known to have ended, also while no step is in flight.
    """

    def __init__(
        self,
        *,
        launcher: RankLauncher,
        resources: RankResources,
        config: ReplicaConfig,
        placement_group: ReplicaPlacementGroup,
        folder: PrivateFolder,
        on_progress: Callable[[RankProgress], None] = lambda _progress: None,
        on_loss: Callable[[], None] = lambda: None,
        examine: bool = True,
    ) -> None:
        """``examine``: check the hosts before anything is loaded, and raise UnfitHosts if the ranks cannot run there."""
        self._config, self._on_progress, self._on_loss = config, on_progress, on_loss
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._workers: list[WorkerHandle] = []
        self._results = ShardResults(launcher.topology.dp)
        self._last_step: int | None = None
        self._deadline_s = config.first_step_timeout_s
        self._broken = False
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch_workers, name="rank-watcher", daemon=True)
        try:
            start_workers(self._workers, launcher, resources, placement_group, folder, self._context)
            connect_workers(self._workers, silence_s=config.host_silence_s)
            if examine:
                examine_workers(self._workers, launcher)
            self._listen_to_all()
            self._capacity = self._load(launcher)
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
                self._raise_loss(f"{worker.name} takes no more plans")
        return PendingRayStep(self, plan.step)

    def close(self) -> None:
        """End the ranks: ask them if all still listen, then kill what is left. Idempotent."""
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
            if worker.disconnect_monitor is not None:
                self._poller.register(worker.disconnect_monitor, zmq.POLLIN)

    def _load(self, launcher: RankLauncher) -> Capacity:
        """Have every rank load its share of the model, and wait until all are ready. Returns the smallest capacity."""
        locations = self.locations
        rendezvous = f"tcp://{locations[0].ip}:{locations[0].free_port}" if len(locations) > 1 else None
        self._frozen_detector = FrozenProcessDetector(
            {worker.rank: worker.location.pid for worker in self._workers if worker.pidfd is not None and worker.location is not None},
            self._config.freeze_timeout_s,
        )
        deadlines = Deadlines(
            start_s=self._config.start_timeout_s,
            first_step_s=self._config.first_step_timeout_s + END_S,
            step_s=self._config.step_timeout_s + END_S,
        )
        for worker, location in zip(self._workers, locations, strict=True):
            on_host = sum(other.node == location.node for other in locations)
            worker.serve_call = worker.actor.serve.remote(
                launcher=launcher, rendezvous=rendezvous, ranks_on_host=on_host, deadlines=deadlines
            )
        self._watcher.start()
        heard = time.monotonic()
        while any(worker.capacity is None for worker in self._workers):
            try:
                heard = time.monotonic() if self._listen() else heard
                self._check_frozen()
                if time.monotonic() - heard > self._config.start_timeout_s:
                    self._raise_loss(f"no rank got further within {self._config.start_timeout_s:g} s")
            except WorkersLost as loss:
                raise StartFailed(f"{loss}\n{loss.rank_traceback or ''}".rstrip()) from loss
        capacities = [worker.capacity for worker in self._workers if worker.capacity is not None]
        return min(capacities, key=lambda capacity: capacity.num_blocks)

    # --- running

    def wait_for(self, step: int) -> StepResult:
        """The result of ``step``; see `PendingStep.result`."""
        deadline = time.monotonic() + self._deadline_s
        while True:
            if (result := self._results.take(step)) is not None:
                self._deadline_s = self._config.step_timeout_s
                return result
            self._listen()
            self._check_frozen()
            if time.monotonic() > deadline:
                self._raise_loss(f"step {step} was not answered within {self._deadline_s:g} s")

    def _listen(self) -> bool:
        """Handle what the ranks have sent, waiting `POLL_MS` at most. Raises WorkersLost at a sign of loss."""
        heard = self._receive(POLL_MS)
        if self._ended.is_set() or any(worker.failure or worker.is_silent for worker in self._workers):
            self._raise_loss(None)
        return heard

    def _check_frozen(self) -> None:
        if (rank := self._frozen_detector.frozen_rank()) is not None:
            self._raise_loss(f"rank {rank} stood still for {self._config.freeze_timeout_s:g} s")

    def _receive(self, timeout_ms: int) -> bool:
        ready = dict(self._poller.poll(timeout_ms))
        for worker in self._workers:
            if worker.socket in ready:
                try:
                    self._handle(worker, decode(worker.socket.recv()))
                except ChannelError as error:  # a rank that sends garbage can no longer be relied on
                    host = worker.location.host if worker.location else ""
                    worker.failure = worker.failure or RankFailed(worker.rank, host, self._last_step, str(error), traceback="")
            if worker.disconnect_monitor is not None and worker.disconnect_monitor in ready:
                worker.is_silent = True
                self._poller.unregister(worker.disconnect_monitor)
        return bool(ready)

    def _handle(self, worker: WorkerHandle, message: object) -> None:
        match message:
            case StepResult():
                self._results.put(message)
            case RankProgress():
                self._on_progress(message)
            case RankReady():
                worker.capacity = message.capacity
            case RankFailed():
                worker.failure = message
            case _:
                logger.warning("%s sent an unexpected %s", worker.name, type(message).__name__)

    # --- losses

    def _watch_workers(self) -> None:
        """Record every rank that ends. Ray reports a killed process within about 20 ms."""
        running = {worker.serve_call: worker for worker in self._workers}
        while running and not self._closing.is_set():
            ended, _ = ray.wait(list(running), num_returns=1, timeout=0.2)
            if self._closing.is_set():  # they were ended on purpose; asking Ray for the reason would take seconds
                return
            for call in ended:
                worker = running.pop(call)
                worker.exit_reason = describe_exit(call)
                request_crash_report(worker)
            if ended and not self._closing.is_set():
                self._ended.set()
                self._on_loss()

    def _raise_loss(self, symptom: str | None) -> Never:
        """Collect further symptoms for `DIAGNOSIS_S`, then raise WorkersLost with the rank that caused the loss."""
        self._broken = True
        deadline = time.monotonic() + DIAGNOSIS_S
        while time.monotonic() < deadline:
            self._receive(POLL_MS)
        fetch_crash_reports(self._workers)
        raise diagnose_loss(self._workers, self._last_step, symptom)


class PendingRayStep:
    """A step in flight."""

    def __init__(self, executor: RayExecutor, step: int) -> None:
        self._executor, self._step = executor, step

    def result(self) -> StepResult:
        return self._executor.wait_for(self._step)
