"""How the ranks of a replica are ended: those that listen are asked, then Ray kills them, then the kernel does."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import ray
import zmq
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.messages import Stop, encode
from cluster.worker import crash_report_path, kill_process, last_collective_path
from cluster.worker_handles import WorkerHandle

END_S = 5.0
"""How long ranks may take to end."""
KILL_S = 1.0
"""How long healthy ranks may take to end once Ray kills them, before the kernel does."""


def shut_down_workers(workers: Sequence[WorkerHandle], *, listening: bool, broken: bool) -> None:
    """``listening``: all are in their loop. ``broken``: some are lost, and what the others wait for never comes."""
    if listening:
        _ask_to_stop(workers)
    for worker in workers:
        ray.kill(worker.actor, no_restart=True)
    if not broken:
        _await_ends(workers, KILL_S)
    for worker in workers:
        _force(worker)
    _await_ends(workers, END_S)
    for worker in workers:
        for left in (Path(worker.ipc.removeprefix("ipc://")), last_collective_path(worker.ipc), crash_report_path(worker.ipc)):
            left.unlink(missing_ok=True)
        if worker.process is not None:
            os.close(worker.process)
            worker.process = None


def _ask_to_stop(workers: Sequence[WorkerHandle]) -> None:
    """Let healthy ranks leave their loop, close their groups and free their shared memory."""
    for worker in workers:
        with contextlib.suppress(zmq.Again):  # its pipe is full of plans that it does not take: it is killed like one that is deaf
            worker.socket.send(encode(Stop()), zmq.NOBLOCK)
    lives = [worker.life for worker in workers]
    ray.wait(lives, num_returns=len(lives), timeout=END_S)


def _await_ends(workers: Sequence[WorkerHandle], within_s: float) -> None:
    """Wait for the processes on this host."""
    deadline = time.monotonic() + within_s
    for worker in workers:
        if worker.process is not None:
            select.select([worker.process], [], [], max(0.0, deadline - time.monotonic()))


def _force(worker: WorkerHandle) -> None:
    """A frozen or busily waiting process does not hear Ray."""
    if worker.process is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker.process, signal.SIGKILL)
    elif worker.location is not None and not worker.ended:
        there = NodeAffinitySchedulingStrategy(worker.location.node, soft=False)
        ray.remote(kill_process).options(num_cpus=0, scheduling_strategy=there).remote(
            worker.location.pid, worker.location.started, worker.location.crash_report
        )
