"""What ranks on other hosts have left in files there: a note of a crash, fetched by Ray once such a rank has ended."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import crash_note
from cluster.seats import Seat

logger = logging.getLogger(__name__)

FETCH_S = 5.0
"""How long a loss may wait for the notes. Ray mostly has a process at hand there that reads them; else it starts one."""


def fetch_notes(seats: Sequence[Seat]) -> None:
    """Give the seats of other hosts that have ended without a word the notes that they left, and take those away there.

    A host that Ray cannot reach has none to give; it is not waited for beyond `FETCH_S`.
    """
    asked = {}
    for seat in seats:
        if seat.ended and not seat.failure and seat.place is not None and seat.place.crash_note is not None:
            there = NodeAffinitySchedulingStrategy(seat.place.node, soft=False)
            asked[ray.remote(_take).options(num_cpus=0, scheduling_strategy=there).remote(seat.place.crash_note)] = seat
    told, silent = ray.wait(list(asked), num_returns=len(asked), timeout=FETCH_S) if asked else ([], [])
    for note in told:
        try:
            asked[note].note = ray.get(note)
        except ray.exceptions.RayError as error:
            logger.warning("no note of %s could be fetched: %s", asked[note].name, error)
    for note in silent:
        logger.warning("no note of %s came within %g s", asked[note].name, FETCH_S)


def _take(file: str) -> str | None:
    note = crash_note.read(Path(file))
    with suppress(OSError):
        Path(file).unlink()
    return note
