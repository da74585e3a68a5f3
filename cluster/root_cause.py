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
from cluster.peer_liveness import KNOCK_S, FarEnd, knock
from cluster.worker import crash_report_path, page_beside
from cluster.worker_handles import Seat
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
class Verdict:
    """On whom a loss is blamed, and why."""

    seat: Seat
    cause: str
    told: str | None = None
    """Its traceback, or its note of a crash."""
    from_outside: bool = False
    """See `WorkersLost`."""


def the_loss(seats: Sequence[Seat], step: int | None, symptom: str | None) -> WorkersLost:
    """The error that tells of it. ``step``: that was submitted last; ``symptom``: by what the loss was seen, if not by a rank's end."""
    verdict = _blame(seats)
    when = f" in step {step}" if step is not None else " while starting"
    if verdict is None:
        return WorkersLost(f"the ranks were lost{when}: {symptom}", last_collectives=_last_collectives(seats))
    kind = HostUnreachable if verdict.cause == FarEnd.HOST_GONE.value else WorkersLost
    return kind(
        f"{verdict.seat.name} was lost{when}: {verdict.cause}" + (f" ({symptom})" if symptom else ""),
        rank=verdict.seat.rank,
        host=verdict.seat.place.host if verdict.seat.place else None,
        rank_traceback=verdict.told,
        last_collectives=_last_collectives(seats),
        from_outside=verdict.from_outside,
    )


def _blame(seats: Sequence[Seat]) -> Verdict | None:
    """A rank that ended without a word is the cause: whoever crashes or raises beside it may be its victim (NCCL aborts a process whose
    peers are gone). Then one that crashed but by SIGABRT, fell silent, aborted, raised, or stands still. A rank on another host whose note
    could not be fetched counts as ended from outside."""
    notes = [(seat, seat.note or crash_report.read(crash_report_path(seat.ipc))) for seat in seats]
    for seat, note in notes:
        if seat.has_ended and not seat.failure and note is None:
            return Verdict(seat, seat.ended or "its process ended", from_outside=True)
    crashed = [(seat, note) for seat, note in notes if note is not None]
    for seat, note in crashed:
        if ABORTED not in note.splitlines()[0]:
            return Verdict(seat, f"it crashed ({note.splitlines()[0]})", note)
    for seat, note in notes:
        if seat.silent and not seat.failure and note is None and seat.place is not None and seat.place.address.tcp is not None:
            return Verdict(seat, knock(seat.place.address.tcp, KNOCK_S).value, from_outside=True)
    if crashed:
        seat, note = crashed[0]
        return Verdict(seat, f"it crashed ({note.splitlines()[0]})", note)
    raised = [(seat, seat.failure) for seat in seats if seat.failure is not None]
    for seat, failure in sorted(raised, key=lambda pair: _says(pair[1], ABOUT_PEERS + PERHAPS_ABOUT_PEERS)):
        from_outside = failure.was_told_to_end or _says(failure, ABOUT_PEERS)
        return Verdict(seat, failure.message, failure.traceback, from_outside)
    for seat in seats:
        if seat.process is not None and seat.place is not None and is_stopped(seat.place.pid):
            return Verdict(seat, "its process is stopped (SIGSTOP or a debugger)", from_outside=True)
    return None


def _says(failure: RankFailed, words: Sequence[str]) -> bool:
    text = failure.message.lower()
    return any(word in text for word in words)


def _last_collectives(seats: Sequence[Seat]) -> tuple[str, ...]:
    """Of the ranks of this host: dead or stopped, they have left a page each."""
    known = ((seat, last_collective(page_beside(seat.ipc))) for seat in seats)
    return tuple(f"rank {seat.rank}: {last}" for seat, last in known if last is not None)


def how_it_ended(life: Any) -> str:
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
