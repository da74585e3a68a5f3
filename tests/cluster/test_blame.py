"""Which rank a loss is blamed on, by what is known of each."""

from pathlib import Path

from cluster.blame import the_loss
from cluster.messages import RankFailed
from cluster.seats import Seat
from cluster.worker import crash_note_beside

ABORTED = "Fatal Python error: Aborted"


def seats(folder: Path) -> tuple[Seat, Seat]:
    first, second = (Seat(rank, None, None, f"ipc://{folder}/{rank}") for rank in range(2))  # type: ignore[arg-type]
    return first, second


def crashed(seat: Seat) -> None:
    seat.ended = "its process died"
    crash_note_beside(seat.ipc).write_text(f"{ABORTED}\n\nCurrent thread 0x1 (most recent call first):")


def test_who_was_killed_is_the_cause_and_not_the_peer_that_aborts_over_it(tmp_path: Path) -> None:
    aborted, killed = seats(tmp_path)
    crashed(aborted)
    killed.ended = "its process died"
    loss = the_loss((aborted, killed), 7, None)
    assert (loss.rank, loss.from_outside) == (1, True)


def test_who_crashed_is_the_cause_and_not_the_peer_that_complains_of_it(tmp_path: Path) -> None:
    complains, crashes = seats(tmp_path)
    complains.failure = RankFailed(0, "h", 7, "RuntimeError: Connection closed by peer", "Traceback")
    crashed(crashes)
    crashes.ended = None  # as long as Ray has not told
    loss = the_loss((complains, crashes), 7, None)
    assert (loss.rank, loss.from_outside) == (1, False)
    assert ABORTED in (loss.rank_traceback or "")


def test_an_error_of_a_device_that_nccl_tells_of_is_the_ranks_own(tmp_path: Path) -> None:
    raised, waits = seats(tmp_path)
    raised.failure = RankFailed(0, "h", 7, "DistBackendError: NCCL error: unhandled cuda error", "Traceback")
    loss = the_loss((raised, waits), 7, None)
    assert (loss.rank, loss.from_outside) == (0, False)


def test_who_was_told_to_end_was_ended_from_outside(tmp_path: Path) -> None:
    told, waits = seats(tmp_path)
    told.failure = RankFailed(0, "h", 7, "SystemExit: 1", "Traceback", was_told_to_end=True)
    assert the_loss((told, waits), 7, None).from_outside
