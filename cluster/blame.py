"""Which rank is to blame for a loss, and what is told of it: by its end, its silence, or its own words, which may blame another."""

from collections.abc import Sequence
from typing import Any

import ray

from cluster import crash_note
from cluster.errors import HostUnreachable
from cluster.far_end import KNOCK_S, FarEnd, knock
from cluster.frozen import is_stopped
from cluster.messages import RankFailed
from cluster.seats import Seat
from cluster.worker import crash_note_beside, page_beside
from engine.errors import WorkersLost
from parallel.last_collective import read as last_collective


def the_loss(seats: Sequence[Seat], step: int | None, symptom: str | None) -> WorkersLost:
    """The error that tells of it. ``step``: that was submitted last; ``symptom``: by what the loss was seen, if not by a rank's end."""
    culprit, cause = _blame(seats)
    crash = _crash_of(culprit)
    when = f" in step {step}" if step is not None else " while starting"
    if culprit is None:
        return WorkersLost(f"the ranks were lost{when}: {symptom}", last_collectives=_last_collectives(seats))
    said = culprit.failure
    kind = HostUnreachable if cause == FarEnd.HOST_GONE.value else WorkersLost
    return kind(
        f"{culprit.name} was lost{when}: {crash.splitlines()[0] if crash else cause}" + (f" ({symptom})" if symptom else ""),
        rank=culprit.rank,
        host=culprit.place.host if culprit.place else None,
        rank_traceback=said.traceback if said else crash,
        last_collectives=_last_collectives(seats),
        from_outside=crash is None and (said is None or _is_about_peers(said)),
    )


def _blame(seats: Sequence[Seat]) -> tuple[Seat | None, str]:
    """A rank that ended, or fell silent, without a word is the cause, one that raised may be its victim; then one that stands still."""
    for seat in seats:
        if seat.ended and not seat.failure:
            return seat, seat.ended
    for seat in seats:
        if seat.silent and not seat.failure and seat.place is not None and seat.place.address.tcp is not None:
            return seat, knock(seat.place.address.tcp, KNOCK_S).value
    raised = [seat for seat in seats if seat.failure]
    for seat in sorted(raised, key=lambda seat: _is_about_peers(seat.failure)):
        assert seat.failure is not None
        return seat, seat.failure.message
    for seat in seats:
        if seat.process is not None and seat.place is not None and is_stopped(seat.place.pid):
            return seat, "its process is stopped (SIGSTOP or a debugger)"
    return None, ""


def _crash_of(seat: Seat | None) -> str | None:
    """What a rank of this host left as it crashed in native code."""
    return crash_note.read(crash_note_beside(seat.ipc)) if seat is not None and seat.ended and not seat.failure else None


def _last_collectives(seats: Sequence[Seat]) -> tuple[str, ...]:
    """Of the ranks of this host: dead or stopped, they have left a page each."""
    known = ((seat, last_collective(page_beside(seat.ipc))) for seat in seats)
    return tuple(f"rank {seat.rank}: {last}" for seat, last in known if last is not None)


def _is_about_peers(failure: RankFailed | None) -> bool:
    """Whether a rank raised because it lost the connection to another, as gloo, NCCL and our own exchange report it."""
    text = failure.message.lower() if failure else ""
    return any(word in text for word in ("connection closed by peer", "connection reset", "broken pipe", "nccl", "gloo", "exchangefailed"))


def how_it_ended(life: Any) -> str:
    """``life``: ObjectRef of the call that lasts as long as a rank, and is over."""
    try:
        ray.get(life)
    except ray.exceptions.RayActorError as error:
        return f"its process died ({_first_line(error)})"
    except ray.exceptions.RayError as error:
        return _first_line(error)
    return "it left its loop"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
