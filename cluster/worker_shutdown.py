"""End the ranks of a replica: ask those that listen, then have Ray kill them, then kill their processes."""

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
"""How long healthy ranks may take to end after Ray's kill, before they get a SIGKILL."""


def shut_down_workers(workers: Sequence[WorkerHandle], *, listening: bool, broken: bool) -> None:
    """End all ranks and delete their files. ``listening``: all are in their loop, so they can be asked. ``broken``: some are lost, and
    the others may wait for them for ever, so nobody is given time to end by itself."""
    if listening:
        _ask_to_stop(workers)
    for worker in workers:
        ray.kill(worker.actor, no_restart=True)
    if not broken:
        _wait_until_ended(workers, KILL_S)
    for worker in workers:
        _kill(worker)
    _wait_until_ended(workers, END_S)
    for worker in workers:
        for file in (Path(worker.ipc.removeprefix("ipc://")), last_collective_path(worker.ipc), crash_report_path(worker.ipc)):
            file.unlink(missing_ok=True)
        if worker.pidfd is not None:
            os.close(worker.pidfd)
            worker.pidfd = None


def _ask_to_stop(workers: Sequence[WorkerHandle]) -> None:
    """Let healthy ranks leave their loop, destroy their process groups and free their shared memory."""
    for worker in workers:
        with contextlib.suppress(zmq.Again):  # its queue is full of plans that it does not read; it will be killed
            worker.socket.send(encode(Stop()), zmq.NOBLOCK)
    serve_calls = [worker.serve_call for worker in workers]
    ray.wait(serve_calls, num_returns=len(serve_calls), timeout=END_S)


def _wait_until_ended(workers: Sequence[WorkerHandle], within_s: float) -> None:
    """Wait until the processes on this host have ended, ``within_s`` at most."""
    deadline = time.monotonic() + within_s
    for worker in workers:
        if worker.pidfd is not None:
            select.select([worker.pidfd], [], [], max(0.0, deadline - time.monotonic()))


def _kill(worker: WorkerHandle) -> None:
    """Send SIGKILL: a stopped or busy-waiting process does not react to Ray."""
    if worker.pidfd is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
    elif worker.location is not None and not worker.exit_reason:
        there = NodeAffinitySchedulingStrategy(worker.location.node, soft=False)
        ray.remote(kill_process).options(num_cpus=0, scheduling_strategy=there).remote(
            worker.location.pid, worker.location.start_ticks, worker.location.crash_report_file
        )
