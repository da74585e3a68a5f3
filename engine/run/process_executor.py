"""An `Executor` whose ranks are child processes, with plans sent over pipes: for benchmarks, tests and machines without Ray."""

import multiprocessing
import pickle
import select
import socket
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.errors import WorkersLost
from engine.executor import Capacity
from engine.gc_tuning import tune_gc
from engine.plan import StepPlan, StepResult
from engine.run.settings import RunnerConfig
from engine.run.start import OnProgress, start_rank
from engine.shard_results import ShardResults
from engine.step_handle import NO_RESULT, StepHandle, message_comes_first
from parallel.topology import Topology

START_TIMEOUT_S = 600.0
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class _Failed:
    """Sent by a rank instead of a result."""

    rank: int
    text: str


def _rank_main(connection: Connection, rank: int, settings: dict[str, Any]) -> None:
    """The main function of a child: start the rank, then execute plans until the parent closes the pipe."""
    try:
        settings["runner_config"] = assign_device(settings["runner_config"], rank)
        with start_rank(rank=rank, **settings) as runner:
            tune_gc()
            connection.send(runner.capacity)
            begun = NO_RESULT
            while True:
                if not message_comes_first(begun, connection.poll):
                    _answer(connection, begun)
                    begun = NO_RESULT
                try:
                    plan = connection.recv()
                except EOFError:
                    return
                following = runner.begin(plan)
                _answer(connection, begun)
                begun = following
    except Exception:  # the parent must learn about any error
        connection.send(_Failed(rank, traceback.format_exc()))


def assign_device(config: RunnerConfig, rank: int) -> RunnerConfig:
    """Distribute ranks over the visible devices.

    Ray shows each rank its own device; here all ranks see all of them and would use the first.
    """
    count = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    return replace(config, device=f"cuda:{rank % count}") if count > 1 else config


def _answer(connection: Connection, begun: StepHandle) -> None:
    if (result := begun.result()) is not None:
        connection.send(result)


class ProcessExecutor:
    """All ranks of a topology on this host, each a child process with its own pipe."""

    def __init__(
        self,
        *,
        checkpoint_folder: Path | str,
        topology: Topology,
        runner_config: RunnerConfig,
        engine_config: EngineConfig,
        adapter: Path | str | None = None,
        step_timeout_s: float = 120.0,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.step_timeout_s = step_timeout_s
        context = multiprocessing.get_context("spawn")
        settings: dict[str, Any] = {
            "checkpoint_folder": checkpoint_folder,
            "topology": topology,
            "rendezvous": f"tcp://{LOOPBACK}:{_free_port()}",
            "runner_config": runner_config,
            "engine_config": engine_config,
            "adapter": adapter,
        }
        self._connections: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(topology.size):
            here, there = context.Pipe()
            process = context.Process(target=_rank_main, args=(there, rank, settings), daemon=True, name=f"rank-{rank}")
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)
        try:
            capacities = [self._receive(rank, START_TIMEOUT_S) for rank in range(topology.size)]
        except WorkersLost:
            self.close()
            raise
        self._capacity: Capacity = capacities[0]
        self._poll = select.poll()
        self._ranks = {connection.fileno(): rank for rank, connection in enumerate(self._connections)}
        for file in self._ranks:
            self._poll.register(file, select.POLLIN)
        self._answers = ShardResults(topology.dp)

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def submit(self, plan: StepPlan) -> "_Pending":
        raw = pickle.dumps(plan)  # once for all ranks
        for rank, connection in enumerate(self._connections):
            try:
                connection.send_bytes(raw)
            except OSError as error:
                raise WorkersLost(f"rank {rank} is gone ({error})", rank=rank, host=socket.gethostname()) from error
        return _Pending(self, plan.step)

    def close(self) -> None:
        """Let the ranks exit by themselves, then kill those that do not."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._connections.clear()
        self._processes.clear()

    def wait_for(self, step: int) -> StepResult:
        while (result := self._answers.take(step)) is None:
            self._answers.put(self._receive_any(self.step_timeout_s))
        return result

    def _receive_any(self, timeout_s: float) -> Any:
        if not self._connections:
            raise WorkersLost("the ranks have been ended", host=socket.gethostname())
        ready = self._poll.poll(1000 * timeout_s)
        if not ready:
            raise WorkersLost(f"no rank answered within {timeout_s:g} s", host=socket.gethostname())
        return self._take(self._ranks[ready[0][0]])

    def _receive(self, rank: int, timeout_s: float) -> Any:
        if not self._connections[rank].poll(timeout_s):
            host = socket.gethostname()
            raise WorkersLost(f"rank {rank} on {host} did not answer within {timeout_s:g} s", rank=rank, host=host)
        return self._take(rank)

    def _take(self, rank: int) -> Any:
        """The next message of a rank, or an error if it is gone."""
        try:
            message = self._connections[rank].recv()
        except (EOFError, OSError) as error:
            host = socket.gethostname()
            raise WorkersLost(f"rank {rank} on {host} ended", rank=rank, host=host) from error
        if isinstance(message, _Failed):
            host = socket.gethostname()
            raise WorkersLost(f"rank {message.rank} on {host} raised", rank=message.rank, host=host, rank_traceback=message.text)
        return message


class _Pending:
    def __init__(self, executor: ProcessExecutor, step: int) -> None:
        self._executor, self._step = executor, step

    def result(self) -> StepResult:
        return self._executor.wait_for(self._step)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
