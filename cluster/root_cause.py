"""Which rank caused a loss, judged by how its process ended, by its silence, or by its own error, which may be due to another rank."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cluster import crash_report
from cluster.errors import HostUnreachable
from cluster.frozen_process import is_stopped
from cluster.messages import RankFailed
from cluster.peer_liveness import PROBE_TIMEOUT_S, PeerStatus, probe_peer
from cluster.worker import crash_report_path, last_collective_path
from cluster.worker_handles import WorkerHandle
from engine.errors import WorkersLost
from parallel.last_collective import read as last_collective

ABOUT_PEERS = ("connection closed by peer", "connection reset", "broken pipe", "remote process exited", "collectivefailed")
"""Parts, in lower case, of the error of a rank that lost the connection to another rank, as gloo, NCCL and our shared-memory collectives
(`CollectiveFailed`) report it."""
PERHAPS_ABOUT_PEERS = ("nccl", "gloo")
"""Parts of errors that may be due to another rank or to the rank itself."""
ABORTED = "Aborted"
"""In the first line of a crash report after SIGABRT. A process aborts itself, over an error of its own or because a peer is gone."""
EXIT = re.compile(r"Worker exit type: (?P<kind>\w+) Worker exit detail: (?P<detail>.*)")
"""Part of Ray's error about an actor whose process has died."""


@dataclass(frozen=True)
class RootCause:
    """The rank that caused a loss, and how."""

    worker: WorkerHandle
    cause: str
    details: str | None = None
    """Its traceback, or its crash report."""
    from_outside: bool = False
    """See `WorkersLost`."""


def diagnose_loss(workers: Sequence[WorkerHandle], step: int | None, symptom: str | None) -> WorkersLost:
    """The error to raise for a loss. ``step``: the last one submitted; ``symptom``: how the loss was noticed, if not by a rank's end."""
    root_cause = _find_root_cause(workers)
    when = f" in step {step}" if step is not None else " while starting"
    if root_cause is None:
        return WorkersLost(f"the ranks were lost{when}: {symptom}", last_collectives=_last_collectives(workers))
    kind = HostUnreachable if root_cause.cause == PeerStatus.HOST_UNREACHABLE.value else WorkersLost
    return kind(
        f"{root_cause.worker.name} was lost{when}: {root_cause.cause}" + (f" ({symptom})" if symptom else ""),
        rank=root_cause.worker.rank,
        host=root_cause.worker.location.host if root_cause.worker.location else None,
        rank_traceback=root_cause.details,
        last_collectives=_last_collectives(workers),
        from_outside=root_cause.from_outside,
    )


def _find_root_cause(workers: Sequence[WorkerHandle]) -> RootCause | None:
    """The most likely cause; None if there is no evidence. In this order:

    1. A rank that ended without an error or a crash report: it was killed from outside, and the errors of other ranks may be
       consequences (NCCL aborts a process whose peers are gone). A rank on another host whose report could not be fetched counts here.
    2. A rank that crashed, other than by SIGABRT.
    3. A rank on another host that is silent.
    4. A rank that aborted.
    5. A rank that raised, those first whose error is not about a peer.
    6. A rank whose process is stopped.
    """
    reports = [(worker, worker.crash_report or crash_report.read(crash_report_path(worker.ipc))) for worker in workers]
    for worker, report in reports:
        if worker.has_ended and not worker.failure and report is None:
            return RootCause(worker, worker.exit_reason or "its process ended", from_outside=True)
    crashed = [(worker, report) for worker, report in reports if report is not None]
    for worker, report in crashed:
        if ABORTED not in report.splitlines()[0]:
            return RootCause(worker, f"it crashed ({report.splitlines()[0]})", report)
    for worker, report in reports:
        tcp = worker.location.address.tcp if worker.location is not None else None
        if worker.is_silent and tcp is not None and not worker.failure and report is None:
            return RootCause(worker, probe_peer(tcp, PROBE_TIMEOUT_S).value, from_outside=True)
    if crashed:
        worker, report = crashed[0]
        return RootCause(worker, f"it crashed ({report.splitlines()[0]})", report)
    raised = [(worker, worker.failure) for worker in workers if worker.failure is not None]
    for worker, failure in sorted(raised, key=lambda pair: _mentions(pair[1], ABOUT_PEERS + PERHAPS_ABOUT_PEERS)):
        from_outside = failure.was_terminated or _mentions(failure, ABOUT_PEERS)
        return RootCause(worker, failure.message, failure.traceback, from_outside)
    for worker in workers:
        if worker.pidfd is not None and worker.location is not None and is_stopped(worker.location.pid):
            return RootCause(worker, "its process is stopped (SIGSTOP or a debugger)", from_outside=True)
    return None


def _mentions(failure: RankFailed, words: Sequence[str]) -> bool:
    text = failure.message.lower()
    return any(word in text for word in words)


def _last_collectives(workers: Sequence[WorkerHandle]) -> tuple[str, ...]:
    """For each rank of this host. The record is in a file, so that of a dead or stopped rank can be read too."""
    known = ((worker, last_collective(last_collective_path(worker.ipc))) for worker in workers)
    return tuple(f"rank {worker.rank}: {last}" for worker, last in known if last is not None)


def describe_exit(serve_call: Any) -> str:
    """Why a rank ended. ``serve_call``: ObjectRef of its `Worker.serve` call, which is over."""
    try:
        ray.get(serve_call)
    except ray.exceptions.RayActorError as error:
        return f"its process died ({_reason(error)})"
    except ray.exceptions.RayError as error:
        return _first_line(error)
    return "it left its loop"


def _reason(error: BaseException) -> str:
    """Ray's reason for the end of a process, for example that the host ran low on memory, without its list of common causes."""
    found = EXIT.search(str(error))
    if found is None:
        return _first_line(error)
    return f"{found['kind']}: {found['detail'].strip().partition(' Some common causes')[0]}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
