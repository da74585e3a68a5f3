"""Which rank a loss is blamed on, by what is known of each."""

from pathlib import Path

import pytest

from cluster.channel import Address
from cluster.messages import RankFailed
from cluster.peer_liveness import PeerStatus
from cluster.root_cause import _reason, diagnose_loss
from cluster.worker import WorkerLocation, crash_report_path
from cluster.worker_handles import WorkerHandle
from parallel.native.shared_memory_collectives import CollectiveFailed

ABORTED = "Fatal Python error: Aborted"


def workers(folder: Path) -> tuple[WorkerHandle, WorkerHandle]:
    first, second = (WorkerHandle(rank, None, None, f"ipc://{folder}/{rank}") for rank in range(2))  # type: ignore[arg-type]
    return first, second


def crashed(worker: WorkerHandle) -> None:
    worker.exit_reason = "its process died"
    crash_report_path(worker.ipc).write_text(f"{ABORTED}\n\nCurrent thread 0x1 (most recent call first):")


def test_who_was_killed_is_the_cause_and_not_the_peer_that_aborts_over_it(tmp_path: Path) -> None:
    aborted, killed = workers(tmp_path)
    crashed(aborted)
    killed.exit_reason = "its process died"
    loss = diagnose_loss((aborted, killed), 7, None)
    assert (loss.rank, loss.from_outside) == (1, True)


def test_a_host_that_is_silent_is_the_cause_and_not_the_rank_that_aborts_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.root_cause.probe_peer", lambda *_: PeerStatus.HOST_UNREACHABLE)
    aborted, silent = workers(tmp_path)
    aborted.exit_reason, aborted.crash_report, aborted.is_silent = "its process died", ABORTED, True
    address = Address(node="n", tcp="tcp://192.0.2.1:5")
    silent.is_silent, silent.location = (
        True,
        WorkerLocation(rank=1, node="n", host="far", ip="192.0.2.1", pid=1, start_ticks=1, address=address, free_port=1),
    )
    loss = diagnose_loss((aborted, silent), 7, None)
    assert (loss.rank, loss.host, loss.from_outside) == (1, "far", True)


def test_who_crashed_is_the_cause_and_not_the_peer_that_complains_of_it(tmp_path: Path) -> None:
    complains, crashes = workers(tmp_path)
    complains.failure = RankFailed(0, "h", 7, "RuntimeError: Connection closed by peer", "Traceback")
    crashed(crashes)
    crashes.exit_reason = None  # as long as Ray has not told
    loss = diagnose_loss((complains, crashes), 7, None)
    assert (loss.rank, loss.from_outside) == (1, False)
    assert ABORTED in (loss.rank_traceback or "")


def test_a_crash_on_another_host_is_the_ranks_own_once_its_note_was_fetched(tmp_path: Path) -> None:
    near, far = workers(tmp_path)
    near.failure = RankFailed(0, "h", 7, "RuntimeError: Connection closed by peer", "Traceback")
    far.exit_reason, far.crash_report = "its process died", f"{ABORTED}\n\nCurrent thread 0x1 (most recent call first):"
    loss = diagnose_loss((near, far), 7, None)
    assert (loss.rank, loss.from_outside) == (1, False)
    assert ABORTED in str(loss)


def test_rays_reason_for_an_end_is_told_and_not_what_it_guesses() -> None:
    said = "The actor died unexpectedly before finishing this task.\n\tclass_name: Worker\nThe actor is dead because its process has died. "
    low = f"{said}Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: The node ran low on memory.\nMemory on the node was 61.0GB"
    unknown = (
        f"{said}Worker exit type: SYSTEM_ERROR Worker exit detail: Connection error code 2. End of file. Some common causes include: (1)"
    )
    assert _reason(RuntimeError(low)) == "NODE_OUT_OF_MEMORY: The node ran low on memory."
    assert _reason(RuntimeError(unknown)) == "SYSTEM_ERROR: Connection error code 2. End of file."
    assert _reason(RuntimeError("The actor's host is gone\nor so")) == "The actor's host is gone"


def test_an_error_of_a_device_that_nccl_tells_of_is_the_ranks_own(tmp_path: Path) -> None:
    raised, waits = workers(tmp_path)
    raised.failure = RankFailed(0, "h", 7, "DistBackendError: NCCL error: unhandled cuda error", "Traceback")
    loss = diagnose_loss((raised, waits), 7, None)
    assert (loss.rank, loss.from_outside) == (0, False)


def test_who_was_told_to_end_was_ended_from_outside(tmp_path: Path) -> None:
    told, waits = workers(tmp_path)
    told.failure = RankFailed(0, "h", 7, "SystemExit: 1", "Traceback", was_terminated=True)
    assert diagnose_loss((told, waits), 7, None).from_outside


def test_a_failed_collective_is_about_a_peer(tmp_path: Path) -> None:
    """The replica sees only the message of a rank's error, with the name of its type: see `Worker._report_failure`."""
    complains, fails = workers(tmp_path)
    error = CollectiveFailed("has left it", 1)
    complains.failure = RankFailed(0, "h", 7, f"{type(error).__name__}: {error}", "Traceback")
    assert diagnose_loss((complains, fails), 7, None).from_outside
    fails.failure = RankFailed(1, "h", 7, "ValueError: a mistake", "Traceback")
    loss = diagnose_loss((complains, fails), 7, None)
    assert (loss.rank, loss.from_outside) == (1, False)
