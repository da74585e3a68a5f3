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
from cluster.worker import crash_report_path, end_process, page_beside
from cluster.worker_handles import Seat

END_S = 5.0
"""How long ranks may take to end."""
KILL_S = 1.0
"""How long healthy ranks may take to end once Ray kills them, before the kernel does."""


def end_ranks(seats: Sequence[Seat], *, listening: bool, broken: bool) -> None:
    """``listening``: all are in their loop. ``broken``: some are lost, and what the others wait for never comes."""
    if listening:
        _ask_to_stop(seats)
    for seat in seats:
        ray.kill(seat.actor, no_restart=True)
    if not broken:
        _await_ends(seats, KILL_S)
    for seat in seats:
        _force(seat)
    _await_ends(seats, END_S)
    for seat in seats:
        for left in (Path(seat.ipc.removeprefix("ipc://")), page_beside(seat.ipc), crash_report_path(seat.ipc)):
            left.unlink(missing_ok=True)
        if seat.process is not None:
            os.close(seat.process)
            seat.process = None


def _ask_to_stop(seats: Sequence[Seat]) -> None:
    """Let healthy ranks leave their loop, close their groups and free their shared memory."""
    for seat in seats:
        with contextlib.suppress(zmq.Again):  # its pipe is full of plans that it does not take: it is killed like one that is deaf
            seat.socket.send(encode(Stop()), zmq.NOBLOCK)
    lives = [seat.life for seat in seats]
    ray.wait(lives, num_returns=len(lives), timeout=END_S)


def _await_ends(seats: Sequence[Seat], within_s: float) -> None:
    """Wait for the processes on this host."""
    deadline = time.monotonic() + within_s
    for seat in seats:
        if seat.process is not None:
            select.select([seat.process], [], [], max(0.0, deadline - time.monotonic()))


def _force(seat: Seat) -> None:
    """A frozen or busily waiting process does not hear Ray."""
    if seat.process is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(seat.process, signal.SIGKILL)
    elif seat.place is not None and not seat.ended:
        there = NodeAffinitySchedulingStrategy(seat.place.node, soft=False)
        ray.remote(end_process).options(num_cpus=0, scheduling_strategy=there).remote(
            seat.place.pid, seat.place.started, seat.place.crash_note
        )
