"""What ranks on other hosts have left in files there: a note of a crash, fetched by Ray once such a rank has ended."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import crash_report
from cluster.worker_handles import WorkerHandle

logger = logging.getLogger(__name__)

FETCH_S = 2.0
"""How long a loss may wait for the notes. Ray mostly has a process at hand there that reads them; else it starts one."""


def ask_for_note(worker: WorkerHandle) -> None:
    """Have the note sent here of a rank of another host that has ended, if it left one. Raises nothing: a loss is told without it."""
    if worker.asked is not None or worker.location is None or worker.location.crash_report is None:
        return
    there = NodeAffinitySchedulingStrategy(worker.location.node, soft=False)
    try:
        worker.asked = ray.remote(_take).options(num_cpus=0, scheduling_strategy=there).remote(worker.location.crash_report)
    except Exception as error:  # whatever Ray is in no state to do
        logger.warning("no note of %s could be asked for: %s", worker.name, error)


def fetch_notes(workers: Sequence[WorkerHandle]) -> None:
    """Give the workers of other hosts that have ended without a word the notes that they left, which are taken away there.

    A host that Ray cannot reach has none to give; it is not waited for beyond `FETCH_S`. Raises nothing.
    """
    ended = [worker for worker in workers if worker.ended and not worker.failure]
    for worker in ended:
        ask_for_note(worker)
    asked = {worker.asked: worker for worker in ended if worker.asked is not None}
    if not asked:
        return
    try:
        told, silent = ray.wait(list(asked), num_returns=len(asked), timeout=FETCH_S)
        for note in told:
            asked[note].note = ray.get(note)
    except Exception as error:  # a host that is gone, or Ray that is
        logger.warning("a note could not be fetched: %s", error)
    else:
        for note in silent:
            logger.warning("no note of %s came within %g s", asked[note].name, FETCH_S)


def _take(file: str) -> str | None:
    note = crash_report.read(Path(file))
    with suppress(OSError):
        Path(file).unlink()
    return note
