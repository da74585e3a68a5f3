"""Step 8 of a request, the far end: the Ray actor that holds one rank, and its loop from plan to result."""

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
from cluster.doctor.gather import cache_folder
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


class Progress(Protocol):
    """How far a start has come; `engine.run.start.StartProgress` is one (named here so that a replica need not import torch)."""

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
    """What a worker needs of a started rank; `engine.run.runner.Runner` is one."""

    @property
    def capacity(self) -> Capacity: ...

    def begin(self, plan: StepPlan) -> StepHandle: ...


class RankLauncher(Protocol):
    """How the ranks of one replica are started. Travels to the workers by Ray."""

    @property
    def topology(self) -> Topology: ...
    @property
    def need(self) -> Need: ...

    def check_host(self) -> None:
        """Raise if what the ranks need is not to be had on the host where this is called. Quick."""
        ...

    def start(self, *, rank: int, rendezvous: str | None, ranks_on_host: int, on_progress: OnProgress) -> AbstractContextManager[Rank]: ...


@dataclass(frozen=True, kw_only=True)
class ModelRankLauncher:
    """Ranks that hold a checkpoint's model."""

    checkpoint_folder: Path | str
    """A path that is there on every host, or a URL; see `model.checkpoint_folder`."""
    topology: Topology
    runner_config: RunnerConfig
    engine_config: EngineConfig
    adapter: Path | str | None = None
    """Added to its weights; lies as a checkpoint does."""
    need: Need = field(default_factory=Need)
    replicas_on_host: int = 1
    """That share a host's memory, this one included."""

    def check_host(self) -> None:
        """A folder must be there on every host. What lies in a store is seen when it is opened."""
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
    """How long a rank may take over something before it is no use to anyone."""

    start_s: float
    """Between two signs of progress while starting."""
    first_step_s: float
    step_s: float


@dataclass(frozen=True, kw_only=True)
class WorkerLocation:
    """Where a rank has come to lie."""

    rank: int
    node: str
    host: str
    ip: str
    pid: int
    started: int
    """Clock ticks from the host's boot to the process's start; with `pid` it names a process for good."""
    address: Address
    free_port: int
    """A TCP port that was free when asked; the ranks may meet there."""
    crash_report: str | None = None
    """Of a rank on another host than its replica's: the file there in which it says how it crashed, if it does."""


class Worker:
    """One rank of a replica. `open`, then `serve`, which lasts as long as the rank does."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._guard: KeyAuthenticator | None = None
        self._disconnect_watcher: DisconnectWatcher | None = None
        self._step: int | None = None
        self._has_told = False
        self._far_note: Path | None = None

    def open(self, *, replica_node: str, ipc: str, replica_key: bytes, silence_s: float) -> WorkerLocation:
        """Listen: on ``ipc`` if the replica is on this host, else on this node's address for the holder of ``replica_key``.

        A rank that cannot hear a replica of another host for ``silence_s`` ends: nobody else can end it then.
        """
        ip = ray.util.get_node_ip_address()
        node = ray.get_runtime_context().get_node_id()
        keys = new_keys()
        if node == replica_node:
            record_to(last_collective_path(ipc))
            crash_report.keep_at(crash_report_path(ipc))
            address = listen(self._socket, ipc=ipc, tcp_host=None, keys=keys, node=node)
        else:
            self._guard = KeyAuthenticator(self._context, {replica_key})
            self._disconnect_watcher = DisconnectWatcher(enable_heartbeats(self._socket, silence_s), self._end)
            address = listen(self._socket, ipc=None, tcp_host=ip, keys=keys, node=node)
            self._far_note = crash_report.new_file(self.rank)
            crash_report.keep_at(self._far_note)
        return WorkerLocation(
            rank=self.rank,
            node=node,
            host=sockets.gethostname(),
            ip=ip,
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            address=address,
            free_port=_free_port(ip),
            crash_report=str(self._far_note) if self._far_note else None,
        )

    def examine(self, ranks: RankLauncher) -> Examined:
        """Facts of this process and its host, to be judged before anything is loaded."""
        return examine_rank(self.rank, ray.util.get_node_ip_address(), cache_folder(), ranks.check_host)

    def serve(self, *, ranks: RankLauncher, rendezvous: str | None, ranks_on_host: int, deadlines: Deadlines) -> None:
        """Start the rank and run plans until told to stop. Whatever is raised is told to the replica first."""
        try:
            self._serve(ranks, rendezvous, ranks_on_host, deadlines)
        except BaseException as error:
            _set_kill_timer(0)
            self._tell(error)
            raise
        finally:
            for helper in (self._disconnect_watcher, self._guard):
                if helper is not None:
                    helper.close()
            self._context.destroy(linger=2000)
            if self._far_note is not None:
                self._far_note.unlink(missing_ok=True)

    def _serve(self, ranks: RankLauncher, rendezvous: str | None, ranks_on_host: int, deadlines: Deadlines) -> None:
        def on_progress(progress: Progress) -> None:
            _set_kill_timer(deadlines.start_s)
            self._send(RankProgress(self.rank, progress.phase, progress.done, progress.total, progress.read))

        self._await_replica(deadlines.start_s)
        _set_kill_timer(deadlines.start_s)
        hit("rank.load")
        with (
            ranks.start(rank=self.rank, rendezvous=rendezvous, ranks_on_host=ranks_on_host, on_progress=on_progress) as rank,
            self._telling(deadlines.step_s),
        ):
            _set_kill_timer(0)
            self._send(RankReady(self.rank, rank.capacity))
            deadline_s, begun = deadlines.first_step_s, NO_RESULT
            while True:
                if not message_comes_first(begun, self._has_message):
                    deadline_s = deadlines.step_s if begun is not NO_RESULT else deadline_s
                    self._answer(begun)
                    begun = NO_RESULT
                if isinstance(plan := decode(self._socket.recv()), Stop):
                    break
                assert isinstance(plan, StepPlan)
                self._step = plan.step
                _set_kill_timer(deadline_s)
                hit("rank.step", lambda plan=plan: (token for work in plan.works for token in work.tokens))
                following = rank.begin(plan)
                deadline_s = deadlines.step_s if begun is not NO_RESULT else deadline_s
                self._answer(begun)
                begun = following
                _set_kill_timer(deadline_s)
            if self._disconnect_watcher is not None:
                self._disconnect_watcher.rest()
            _set_kill_timer(deadlines.step_s)
        _set_kill_timer(0)

    @contextmanager
    def _telling(self, leave_s: float) -> Iterator[None]:
        """What is raised within is told before the rank is left: where its device is lost, graphs and groups may not let go of it, or only
        with an error of their own."""
        try:
            yield
        except BaseException as error:
            self._tell(error)
            _set_kill_timer(leave_s)
            raise

    def _tell(self, error: BaseException) -> None:
        """The replica learns of the first one."""
        if self._has_told:
            return
        self._has_told = True
        told_to_end = isinstance(error, SystemExit | KeyboardInterrupt)  # SystemExit is how Ray hands on SIGTERM
        message = f"{type(error).__name__}: {error}"
        with suppress(zmq.Again):  # nobody is connected
            self._send(RankFailed(self.rank, sockets.gethostname(), self._step, message, traceback.format_exc(), told_to_end))

    def _await_replica(self, within_s: float) -> None:
        """`serve` comes by Ray, the connection by itself: until it is there nothing can be sent without waiting."""
        if not self._socket.poll(int(1000 * within_s), zmq.POLLOUT):
            raise ChannelError(f"the replica did not connect within {within_s:g} s")

    def _answer(self, begun: StepHandle) -> None:
        result = begun.result()
        _set_kill_timer(0)
        if result is not None and not hit("rank.answer"):
            self._send(result)

    def _has_message(self) -> bool:
        return bool(self._socket.poll(0))

    def _end(self) -> None:
        """The replica is gone, or its host is. What this rank would wait for in native code never comes, so it is not waited for."""
        print(f"rank {self.rank} ends: its replica cannot be heard any more", file=sys.stderr, flush=True)
        if self._far_note is not None:
            self._far_note.unlink(missing_ok=True)
        os._exit(1)

    def _send(self, message: StepResult | RankProgress | RankReady | RankFailed) -> None:
        self._socket.send(encode(message), zmq.NOBLOCK)


def last_collective_path(ipc: str) -> Path:
    """Where a rank of this host keeps its last collective, for its replica to read; ``ipc`` is the rank's endpoint."""
    return Path(ipc.removeprefix("ipc://") + ".last")


def crash_report_path(ipc: str) -> Path:
    """Where a rank of this host says how it crashed, if it does; ``ipc`` is the rank's endpoint."""
    return Path(ipc.removeprefix("ipc://") + ".crash")


def _set_kill_timer(seconds: float) -> None:
    """Have the kernel end this process in ``seconds`` (0 = never).

    A rank that waits for a dead peer inside native code hears neither Python threads nor Python signal handlers; an
    alarm with its default action needs neither, so no rank can outlive its replica in such a wait.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _free_port(ip: str) -> int:
    with sockets.socket(sockets.AF_INET6 if ":" in ip else sockets.AF_INET) as probe:
        probe.bind((ip, 0))
        port: int = probe.getsockname()[1]
        return port


def kill_process(pid: int, started: int, left: str | None) -> None:
    """Kill a process of this host, and remove the file ``left`` of it; run by Ray on the host of a rank that may not answer it."""
    with suppress(OSError):
        if _start_of(pid) == started:
            os.kill(pid, signal.SIGKILL)
    with suppress(OSError):
        if left is not None:
            os.unlink(left)


def _start_of(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat, see proc(5)."""
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[19])
