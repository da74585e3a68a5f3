"""Place 5 of a request: a replica, one copy of the model on its ranks, the engine that drives them, and a socket for the fronts."""

import contextlib
import logging
import os
import socket
import threading
import time

import ray

from cluster.block_journal import BlockJournal
from cluster.canary import Canary
from cluster.channel import PrivateFolder
from cluster.config import RankResources, ReplicaConfig
from cluster.directory import Load, RankPlace, Refusal, ReplicaRecord, Reporter
from cluster.errors import HostUnreachable, RecoveryGivenUp, StartFailed, UnfitHosts
from cluster.executor import RayExecutor
from cluster.health import Health, StartProgressTracker, State, StepStallDetector
from cluster.intake import Intake
from cluster.messages import Pong, RankProgress
from cluster.placement_group import ReplicaPlacementGroup
from cluster.recovery import Recovery
from cluster.worker import RankLauncher
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import EngineStopped, WorkersLost
from engine.executor import Executor
from engine.failpoints import hit
from engine.fair_share import FairShare
from engine.output import EngineOutput
from engine.request import Request
from engine.stats import EngineStats

logger = logging.getLogger(__name__)

PLACEMENT_TIMEOUT_S = 300.0


class Replica:
    """Owns the ranks, the engine's thread, the intake for fronts and the heartbeat. `start` returns once a canary got its token."""

    def __init__(
        self,
        *,
        id: str,
        app: str,
        model: str,
        launcher: RankLauncher,
        engine_config: EngineConfig,
        resources: RankResources | None = None,
        config: ReplicaConfig | None = None,
        version: str = "",
    ) -> None:
        """``version``: that of the deployed application; it tells its replicas from those of an earlier deployment."""
        self.id, self.model, self._version = id, model, version
        self._launcher, self._engine_config = launcher, engine_config
        self._resources = resources or RankResources()
        self._config = config or ReplicaConfig()
        self._reporter = Reporter(app)
        self._start_progress = StartProgressTracker(launcher.topology.size)
        self._closed = threading.Event()
        self._placement_group: ReplicaPlacementGroup | None = None
        self._executor: RayExecutor | None = None
        self._engine: Engine | None = None
        self.health = Health()
        self._stall_detector = StepStallDetector(self._config.progress_timeout_s)
        self.recovery = Recovery(self._start_executor, self._config, sleep=self._closed.wait)
        self._canary = Canary(self.health, self._submit)
        self._folder = PrivateFolder()
        self._journal = BlockJournal()
        self._intake = Intake(
            folder=self._folder,
            node=ray.get_runtime_context().get_node_id(),
            tcp_host=ray.util.get_node_ip_address() if self._config.other_hosts else None,
            submit=self._submit,
            cancel=lambda request_id, choice: self._engine.cancel(request_id, choice) if self._engine else None,
            pong=self._pong,
            failed=self.health.mark_failed,
            front_silence_s=self._config.front_silence_s,
            heartbeat_s=self._config.heartbeat_s,
            journal=self._journal,
        )
        self._heartbeat_thread = threading.Thread(target=self._run_heartbeat, name="heartbeat", daemon=True)
        self._engine_thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)

    def start(self) -> None:
        """Start the ranks in a placement group, then wait until a canary proves that they make tokens.

        Raises:
            StartFailed: with the error of the rank that failed.
            UnfitHosts: the checks of the hosts failed; the findings have also been published in the directory.
        """
        self._heartbeat_thread.start()
        try:
            self._placement_group = ReplicaPlacementGroup.current_or_new(self._launcher, self._resources, timeout_s=PLACEMENT_TIMEOUT_S)
            executor = self._start_executor()
            self._engine = Engine(executor, self._engine_config, recover=self._recover, policy=FairShare(), listener=self._journal)
            self._engine_thread.start()
            self._intake.start()
            self._wait_until_ready()
        except BaseException as error:
            if isinstance(error, UnfitHosts):
                self._reporter.refuse(self.id, Refusal(why=str(error), version=self._version))
            self.health.mark_failed(str(error))
            self.close(drain=False)
            raise

    def raise_if_failed(self) -> None:
        """Raise RecoveryGivenUp if the replica must be replaced. One that is restarting its ranks need not be."""
        if self.health.state is State.FAILED:
            raise RecoveryGivenUp(self.health.reason)

    def close(self, *, drain: bool = True) -> None:
        """Stop taking requests, let the running ones finish (if ``drain``), then end the ranks. Idempotent."""
        if self._closed.is_set():
            return
        self.health.mark_draining()
        self._intake.wake()
        if drain and self._engine is not None:
            deadline = time.monotonic() + self._config.drain_timeout_s
            while not self._is_idle() and self._engine_thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.05)
        self._closed.set()
        if self._engine is not None:
            self._engine.stop()
            self._engine_thread.join(self._config.step_timeout_s)
        if self._heartbeat_thread.ident is not None:
            self._heartbeat_thread.join(5)
        self._intake.close()
        if self._executor is not None:
            self._executor.close()
        if self._placement_group is not None:
            self._placement_group.close()
        self._reporter.leave(self.id)
        self._folder.close()

    def record(self) -> ReplicaRecord:
        """What the replica reports to the directory."""
        executor, engine = self._executor, self._engine
        losses = self.recovery.post_mortems
        return ReplicaRecord(
            id=self.id,
            model=self.model,
            state=self.health.state,
            reason=self.health.reason,
            loading=None if self.health.ready else self._start_progress.loading,
            address=self._intake.address,
            guest_keys=self._intake.guest_keys,
            capacity=executor.capacity if executor and engine else None,
            load=self._load(),
            stats=engine.stats if engine else None,
            host=socket.gethostname(),
            pid=os.getpid(),
            ranks=self._rank_places(),
            num_restarts=self.recovery.num_restarts,
            last_loss=str(losses[-1]) if losses else None,
        )

    def _submit(self, request: Request) -> None:
        """Submit a request to the engine. Without an engine it raises, so that a canary is not taken for pending.

        Raises:
            EngineStopped: the engine accepts nothing, or not yet.
            QueueFull: see `Engine.submit`.
        """
        if self._engine is None:
            raise EngineStopped("the engine has not started yet")
        self._engine.submit(request)

    # --- the ranks

    def _start_executor(self) -> RayExecutor:
        """Start new ranks. Raises StartFailed, or EngineStopped if the replica is closed meanwhile."""
        self._raise_if_closed()
        hit("replica.start")
        assert self._placement_group is not None
        self._canary.note_restart()
        self._start_progress = StartProgressTracker(self._launcher.topology.size)
        executor = RayExecutor(
            launcher=self._launcher,
            resources=self._resources,
            config=self._config,
            placement_group=self._placement_group,
            folder=self._folder,
            on_progress=self._note_progress,
            on_loss=self._on_loss,
            examine=self._executor is None,  # not after a loss: the hosts are known, and a lost rank's memory may not be freed yet
        )
        try:
            self._raise_if_closed()
        except EngineStopped:
            executor.close()
            raise
        self._executor = executor
        return executor

    def _raise_if_closed(self) -> None:
        if self._closed.is_set():
            raise EngineStopped("the replica is being stopped")

    def _note_progress(self, progress: RankProgress) -> None:
        self._raise_if_closed()  # loading weights may take minutes
        self._start_progress.update(progress.rank, progress.phase, progress.done, progress.total, progress.read)

    def _on_loss(self) -> None:
        """A rank has ended, maybe while no step is in flight. The canary makes the engine run a step, in which it notices the loss."""
        self.health.mark_lost("a rank ended", announced=False)
        self._intake.wake()
        self._canary.send()

    # --- the engine's thread

    def _run_engine(self) -> None:
        try:
            assert self._engine is not None
            self._engine.run_forever(self._deliver)
        except Exception as error:
            logger.exception("the engine ended")
            self.health.mark_failed(str(error))
            self._intake.wake()

    def _deliver(self, output: EngineOutput) -> None:
        if output.token_batches or any(event.tokens for event in output.events):  # an error proves nothing: a faulty device may give NaN
            self.health.record_token()
        was_ready = self.health.ready
        self._intake.deliver(self._canary.consume(output))
        if self.health.ready != was_ready:
            self._intake.wake()

    def _recover(self, loss: WorkersLost) -> Executor:
        """Called by the engine after a loss; the engine and its clients wait until new ranks are ready."""
        assert self._executor is not None
        self.health.mark_lost(str(loss), host=loss.host if isinstance(loss, HostUnreachable) else None)
        self._intake.wake()
        executor = self.recovery.restore(self._executor, loss)
        self._canary.send()
        return executor

    # --- the heartbeat's thread

    def _run_heartbeat(self) -> None:
        try:
            while not self._closed.wait(self._config.heartbeat_s if self._engine else 0.25):
                with contextlib.suppress(Exception):
                    if not hit("replica.heartbeat"):
                        self._reporter.report(self.record())
                if self._engine is not None:
                    self._check_progress()
        except Exception as error:
            logger.exception("the heartbeat ended")
            self.health.mark_failed(f"the heartbeat ended: {error}")
            self._intake.wake()

    def _check_progress(self) -> None:
        """While the engine has work, finished steps prove that the ranks work; an idle replica sends a canary from time to time."""
        assert self._engine is not None
        state, stats, idle = self.health.state, self._engine.stats, self._is_idle()
        if idle:
            self._stall_detector.reset()
        if state in (State.STARTING, State.RECOVERING):
            self._canary.send()
        elif state is State.READY and not idle:
            if (stalled_s := self._stall_detector.stalled_s(stats.num_steps, stats.step_s)) is not None:
                self.health.mark_suspect(f"no step was finished for {stalled_s:.0f} s")
                self._intake.wake()
            elif self.health.unproven_s > self._config.canary_every_s:  # there are steps, but no tokens
                self._canary.send()
        elif state is State.READY:
            if self._canary.pending_s > self._config.canary_timeout_s:
                self.health.mark_suspect(f"no canary token for {self._canary.pending_s:.0f} s")
                self._intake.wake()
            elif self.health.unproven_s > self._config.canary_every_s:
                self._canary.send()

    # --- what is reported

    def _load(self) -> Load:
        if self._engine is None:
            return Load()
        stats = self._engine.stats
        return Load(num_running=stats.num_running, num_waiting=stats.num_waiting, kv_used=stats.kv_used)

    def _rank_places(self) -> tuple[RankPlace, ...]:
        locations = self._executor.locations if self._executor else ()
        return tuple(RankPlace(rank=p.rank, host=p.host, pid=p.pid, read=self._start_progress.read_by(p.rank)) for p in locations)

    def _pong(self) -> Pong:
        stats = self._engine.stats if self._engine else EngineStats()
        return Pong(
            ready=self.health.ready,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            prefill_tokens=stats.prefill_tokens,
            step_base_s=stats.step_base_s,
            step_token_s=stats.step_token_s,
            ranks_lost=self.health.ranks_lost,
            lost_host=self.health.lost_host,
        )

    def _is_idle(self) -> bool:
        """Whether the engine has no request except maybe a canary."""
        load = self._load()
        return load.num_running + load.num_waiting <= (1 if self._canary.pending_s else 0)

    def _wait_until_ready(self) -> None:
        self._canary.send()
        deadline = time.monotonic() + self._config.first_step_timeout_s + self._config.step_timeout_s
        while not self.health.ready:
            if self.health.state is State.FAILED or time.monotonic() > deadline:
                raise StartFailed(f"the ranks started, but made no token: {self.health.reason}")
            time.sleep(0.02)
