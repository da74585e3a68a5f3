"""Which rank is to blame for a loss, and what is told of it: by its end, its silence, or its own words, which may blame another."""

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

ABOUT_PEERS = ("connection closed by peer", "connection reset", "broken pipe", "remote process exited", "exchangefailed")
"""In what a rank says that lost the connection to another, as gloo, NCCL and our own exchange report it."""
PERHAPS_ABOUT_PEERS = ("nccl", "gloo")
"""Where an error of a rank's own may come to light as well."""
ABORTED = "Aborted"
"""In the first line of a note, where it was SIGABRT: by that a process ends itself, over its own mistake or a peer that is gone."""
EXIT = re.compile(r"Worker exit type: (?P<kind>\w+) Worker exit detail: (?P<detail>.*)")
"""In what Ray says of an actor whose process has died."""


@dataclass(frozen=True)
class RootCause:
    """On whom a loss is blamed, and why."""

    worker: WorkerHandle
    cause: str
    told: str | None = None
    """Its traceback, or its note of a crash."""
    from_outside: bool = False
    """See `WorkersLost`."""


def diagnose_loss(workers: Sequence[WorkerHandle], step: int | None, symptom: str | None) -> WorkersLost:
    """The error that tells of it. ``step``: that was submitted last; ``symptom``: by what the loss was seen, if not by a rank's end."""
    root_cause = _find_root_cause(workers)
    when = f" in step {step}" if step is not None else " while starting"
    if root_cause is None:
        return WorkersLost(f"the ranks were lost{when}: {symptom}", last_collectives=_last_collectives(workers))
    kind = HostUnreachable if root_cause.cause == PeerStatus.HOST_UNREACHABLE.value else WorkersLost
    return kind(
        f"{root_cause.worker.name} was lost{when}: {root_cause.cause}" + (f" ({symptom})" if symptom else ""),
        rank=root_cause.worker.rank,
        host=root_cause.worker.location.host if root_cause.worker.location else None,
        rank_traceback=root_cause.told,
        last_collectives=_last_collectives(workers),
        from_outside=root_cause.from_outside,
    )


def _find_root_cause(workers: Sequence[WorkerHandle]) -> RootCause | None:
    """A rank that ended without a word is the cause: whoever crashes or raises beside it may be its victim (NCCL aborts a process whose
    peers are gone). Then one that crashed but by SIGABRT, fell silent, aborted, raised, or stands still. A rank on another host whose note
    could not be fetched counts as ended from outside."""
    notes = [(worker, worker.note or crash_report.read(crash_report_path(worker.ipc))) for worker in workers]
    for worker, note in notes:
        if worker.has_ended and not worker.failure and note is None:
            return RootCause(worker, worker.ended or "its process ended", from_outside=True)
    crashed = [(worker, note) for worker, note in notes if note is not None]
    for worker, note in crashed:
        if ABORTED not in note.splitlines()[0]:
            return RootCause(worker, f"it crashed ({note.splitlines()[0]})", note)
    for worker, note in notes:
        if (
            worker.silent
            and not worker.failure
            and note is None
            and worker.location is not None
            and worker.location.address.tcp is not None
        ):
            return RootCause(worker, probe_peer(worker.location.address.tcp, PROBE_TIMEOUT_S).value, from_outside=True)
    if crashed:
        worker, note = crashed[0]
        return RootCause(worker, f"it crashed ({note.splitlines()[0]})", note)
    raised = [(worker, worker.failure) for worker in workers if worker.failure is not None]
    for worker, failure in sorted(raised, key=lambda pair: _says(pair[1], ABOUT_PEERS + PERHAPS_ABOUT_PEERS)):
        from_outside = failure.was_told_to_end or _says(failure, ABOUT_PEERS)
        return RootCause(worker, failure.message, failure.traceback, from_outside)
    for worker in workers:
        if worker.process is not None and worker.location is not None and is_stopped(worker.location.pid):
            return RootCause(worker, "its process is stopped (SIGSTOP or a debugger)", from_outside=True)
    return None


def _says(failure: RankFailed, words: Sequence[str]) -> bool:
    text = failure.message.lower()
    return any(word in text for word in words)


def _last_collectives(workers: Sequence[WorkerHandle]) -> tuple[str, ...]:
    """Of the ranks of this host: dead or stopped, they have left a page each."""
    known = ((worker, last_collective(last_collective_path(worker.ipc))) for worker in workers)
    return tuple(f"rank {worker.rank}: {last}" for worker, last in known if last is not None)


def describe_exit(life: Any) -> str:
    """``life``: ObjectRef of the call that lasts as long as a rank, and is over."""
    try:
        ray.get(life)
    except ray.exceptions.RayActorError as error:
        return f"its process died ({_reason(error)})"
    except ray.exceptions.RayError as error:
        return _first_line(error)
    return "it left its loop"


def _reason(error: BaseException) -> str:
    """What Ray knows of a process's end, such as that the host's memory ran low, without its list of what may be behind an end that it
    knows nothing of."""
    found = EXIT.search(str(error))
    if found is None:
        return _first_line(error)
    return f"{found['kind']}: {found['detail'].strip().partition(' Some common causes')[0]}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
