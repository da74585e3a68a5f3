"""Place 8 of a request, in the worker: the Ray actor that runs one rank, and its loop from `StepPlan` to `StepResult`."""

import os
import signal
import socket as sockets
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import ray
import zmq

from cluster import crash_report
from cluster.channel import Address, KeyAuthenticator, listen, new_keys
from cluster.doctor.facts import Need
from cluster.doctor.survey import Examined, examine_rank
from cluster.errors import ChannelError
from cluster.messages import RankFailed, RankProgress, RankReady, Stop, decode, encode
from cluster.peer_liveness import DisconnectWatcher, enable_heartbeats
from engine.config import EngineConfig
from engine.executor import Capacity
from engine.failpoints import hit
from engine.gc_tuning import tune_gc
from engine.load_stats import LoadStats
from engine.plan import StepPlan, StepResult
from engine.run.settings import RunnerConfig
from engine.step_handle import NO_RESULT, StepHandle, message_comes_first
from model.adapter_config import CONFIG_FILE
from parallel.last_collective import record_to
from parallel.topology import Topology
from parallel.user_cache import cache_folder


class Progress(Protocol):
    """How far a rank's start has come, such as `engine.run.start.StartProgress`. A protocol, so that a replica need not import torch."""

    @property
    def phase(self) -> str: ...
    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def read(self) -> LoadStats | None: ...


OnProgress = Callable[[Progress], None]


class Rank(Protocol):
    """A started rank, such as `engine.run.runner.Runner`."""

    @property
    def capacity(self) -> Capacity: ...

    def begin(self, plan: StepPlan) -> StepHandle: ...


class RankLauncher(Protocol):
    """Starts the ranks of one replica. Ray pickles it to the workers."""

    @property
    def topology(self) -> Topology: ...
    @property
    def need(self) -> Need: ...

    def check_host(self) -> None:
        """Raise if this host lacks something that the ranks need. Must be quick."""
        ...

    def start(self, *, rank: int, rendezvous: str | None, ranks_on_host: int, on_progress: OnProgress) -> AbstractContextManager[Rank]: ...


@dataclass(frozen=True, kw_only=True)
class ModelRankLauncher:
    """Starts ranks that run the model of a checkpoint."""

    checkpoint_folder: Path | str
    """A path that exists on every host, or a URL; see `model.checkpoint_folder`."""
    topology: Topology
    runner_config: RunnerConfig
    engine_config: EngineConfig
    adapter: Path | str | None = None
    """A LoRA adapter to merge into the weights: a path or a URL, like the checkpoint."""
    need: Need = field(default_factory=Need)
    replicas_on_host: int = 1
    """How many replicas share a host's memory, this one included."""

    def check_host(self) -> None:
        """Raise FileNotFoundError for a folder that is missing on this host. A URL is checked when it is opened."""
        if "://" not in str(self.checkpoint_folder) and not (Path(self.checkpoint_folder) / "config.json").is_file():
            raise FileNotFoundError(f"there is no {self.checkpoint_folder}/config.json")
        if self.adapter is not None and "://" not in str(self.adapter) and not (Path(self.adapter) / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"there is no {self.adapter}/{CONFIG_FILE}")

    @contextmanager
    def start(self, *, rank: int, rendezvous: str | None, ranks_on_host: int, on_progress: OnProgress) -> Iterator[Rank]:
        from engine.run.start import start_rank

        with start_rank(
            checkpoint_folder=self.checkpoint_folder,
            topology=self.topology,
            rank=rank,
            rendezvous=rendezvous,
            runner_config=self.runner_config,
            engine_config=self.engine_config,
            adapter=self.adapter,
            on_progress=on_progress,
            ranks_on_host=ranks_on_host,
            replicas_on_host=self.replicas_on_host,
        ) as started:
            tune_gc()
            yield started


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long a rank may take for something before it ends its own process."""

    start_s: float
    """Between two progress reports of a start."""
    first_step_s: float
    step_s: float


@dataclass(frozen=True, kw_only=True)
class WorkerLocation:
    """Where a rank's process runs, and how to reach it."""

    rank: int
    node: str
    host: str
    ip: str
    pid: int
    start_ticks: int
    """Clock ticks from the host's boot to the process's start; together with `pid` it identifies the process even if the pid is reused."""
    address: Address
    free_port: int
    """A TCP port that was free a moment ago, for the rendezvous of the ranks."""
    crash_report_file: str | None = None
    """Path of its crash report on its own host, if that is not the replica's host."""


class Worker:
    """One rank of a replica, as a Ray actor. Call `open`, then `serve`, which returns when the rank ends."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._authenticator: KeyAuthenticator | None = None
        self._disconnect_watcher: DisconnectWatcher | None = None
        self._step: int | None = None
        self._has_reported = False
        self._crash_report_file: Path | None = None

    def open(self, *, replica_node: str, ipc: str, replica_key: bytes, silence_s: float) -> WorkerLocation:
        """Listen for the replica: on ``ipc`` if it is on this host, else over TCP, for the holder of ``replica_key`` only.

        If nothing is heard from a replica on another host for ``silence_s``, the rank ends its own process, because the replica
        may no longer be able to.
        """
        ip = ray.util.get_node_ip_address()
        node = ray.get_runtime_context().get_node_id()
        keys = new_keys()
        if node == replica_node:
            record_to(last_collective_path(ipc))
            crash_report.enable(crash_report_path(ipc))
            address = listen(self._socket, ipc=ipc, tcp_host=None, keys=keys, node=node)
        else:
            self._authenticator = KeyAuthenticator(self._context, {replica_key})
            self._disconnect_watcher = DisconnectWatcher(enable_heartbeats(self._socket, silence_s), self._exit_process)
            address = listen(self._socket, ipc=None, tcp_host=ip, keys=keys, node=node)
            self._crash_report_file = crash_report.new_file(self.rank)
            crash_report.enable(self._crash_report_file)
        return WorkerLocation(
            rank=self.rank,
            node=node,
            host=sockets.gethostname(),
            ip=ip,
            pid=os.getpid(),
            start_ticks=_start_ticks_of(os.getpid()),
            address=address,
            free_port=_free_port(ip),
            crash_report_file=str(self._crash_report_file) if self._crash_report_file else None,
        )

    def examine(self, launcher: RankLauncher) -> Examined:
        """Gather facts about this process and its host, for the checks that run before anything is loaded."""
        return examine_rank(self.rank, ray.util.get_node_ip_address(), cache_folder(), launcher.check_host)

    def serve(self, *, launcher: RankLauncher, rendezvous: str | None, ranks_on_host: int, deadlines: Deadlines) -> None:
        """Start the rank and run plans until `Stop` arrives. An exception is reported to the replica before it is raised."""
        try:
            self._serve(launcher, rendezvous, ranks_on_host, deadlines)
        except BaseException as error:
            _set_kill_timer(0)
            self._report_failure(error)
            raise
        finally:
            for helper in (self._disconnect_watcher, self._authenticator):
                if helper is not None:
                    helper.close()
            self._context.destroy(linger=2000)
            if self._crash_report_file is not None:
                self._crash_report_file.unlink(missing_ok=True)

    def _serve(self, launcher: RankLauncher, rendezvous: str | None, ranks_on_host: int, deadlines: Deadlines) -> None:
        def on_progress(progress: Progress) -> None:
            _set_kill_timer(deadlines.start_s)
            self._send(RankProgress(self.rank, progress.phase, progress.done, progress.total, progress.read))

        self._await_replica(deadlines.start_s)
        _set_kill_timer(deadlines.start_s)
        hit("rank.load")
        with (
            launcher.start(rank=self.rank, rendezvous=rendezvous, ranks_on_host=ranks_on_host, on_progress=on_progress) as rank,
            self._reporting_failure(deadlines.step_s),
        ):
            _set_kill_timer(0)
            self._send(RankReady(self.rank, rank.capacity))
            step_s, previous = deadlines.first_step_s, NO_RESULT

            def finish(step: StepHandle) -> None:
                """Send the step's result. From the first one on, a step may take only ``deadlines.step_s``."""
                nonlocal step_s
                self._send_result(step)
                if step is not NO_RESULT:
                    step_s = deadlines.step_s

            while True:
                if not message_comes_first(previous, self._has_message):
                    finish(previous)
                    previous = NO_RESULT
                if isinstance(plan := decode(self._socket.recv()), Stop):
                    break
                assert isinstance(plan, StepPlan)
                self._step = plan.step
                _set_kill_timer(step_s)
                hit("rank.step", lambda plan=plan: (token for work in plan.works for token in work.tokens))
                begun = rank.begin(plan)
                finish(previous)
                previous = begun
                _set_kill_timer(step_s)
            if self._disconnect_watcher is not None:
                self._disconnect_watcher.disarm()
            _set_kill_timer(deadlines.step_s)
        _set_kill_timer(0)

    @contextmanager
    def _reporting_failure(self, teardown_s: float) -> Iterator[None]:
        """Report an exception before the rank is torn down, for which ``teardown_s`` is the limit.

        After the loss of a device, releasing its graphs and process groups may hang or raise errors of its own.
        """
        try:
            yield
        except BaseException as error:
            self._report_failure(error)
            _set_kill_timer(teardown_s)
            raise

    def _report_failure(self, error: BaseException) -> None:
        """Send `RankFailed` to the replica, for the first exception only."""
        if self._has_reported:
            return
        self._has_reported = True
        was_terminated = isinstance(error, SystemExit | KeyboardInterrupt)  # Ray turns SIGTERM into SystemExit
        message = f"{type(error).__name__}: {error}"
        with suppress(zmq.Again):  # the replica is not connected
            self._send(RankFailed(self.rank, sockets.gethostname(), self._step, message, traceback.format_exc(), was_terminated))

    def _await_replica(self, within_s: float) -> None:
        """Wait for the replica's connection. The call of `serve` comes through Ray and may be here first; sends do not wait."""
        if not self._socket.poll(int(1000 * within_s), zmq.POLLOUT):
            raise ChannelError(f"the replica did not connect within {within_s:g} s")

    def _send_result(self, step: StepHandle) -> None:
        result = step.result()
        _set_kill_timer(0)
        if result is not None and not hit("rank.answer"):
            self._send(result)

    def _has_message(self) -> bool:
        return bool(self._socket.poll(0))

    def _exit_process(self) -> None:
        """End this process at once: the replica or its host is gone, and a collective that waits in native code would never return."""
        print(f"rank {self.rank} ends: nothing is heard from its replica", file=sys.stderr, flush=True)
        if self._crash_report_file is not None:
            self._crash_report_file.unlink(missing_ok=True)
        os._exit(1)

    def _send(self, message: StepResult | RankProgress | RankReady | RankFailed) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)


def last_collective_path(ipc: str) -> Path:
    """The file in which a rank of this host records its last collective, for the replica to read. ``ipc``: the rank's endpoint."""
    return Path(ipc.removeprefix("ipc://") + ".last")


def crash_report_path(ipc: str) -> Path:
    """The file to which a rank of this host writes a crash report. ``ipc``: the rank's endpoint."""
    return Path(ipc.removeprefix("ipc://") + ".crash")


def _set_kill_timer(seconds: float) -> None:
    """Have the kernel kill this process in ``seconds`` (0 = never).

    While a rank waits for a dead peer in native code, neither Python threads nor Python signal handlers run. The default action
    of SIGALRM needs neither, so such a rank cannot outlive its replica.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _free_port(ip: str) -> int:
    with sockets.socket(sockets.AF_INET6 if ":" in ip else sockets.AF_INET) as probe:
        probe.bind((ip, 0))
        port: int = probe.getsockname()[1]
        return port


def kill_process(pid: int, start_ticks: int, crash_report_file: str | None) -> None:
    """Kill a process of this host, if it is the one that started at ``start_ticks``, and delete its crash report.

    Runs as a Ray task on the host of a rank whose actor may no longer answer Ray.
    """
    with suppress(OSError):
        if _start_ticks_of(pid) == start_ticks:
            os.kill(pid, signal.SIGKILL)
    with suppress(OSError):
        if crash_report_file is not None:
            os.unlink(crash_report_file)


def _start_ticks_of(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat, see proc(5)."""
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[19])
