"""Crash reports of ranks on other hosts: files there, which a Ray task reads once such a rank has ended."""

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
"""How long a loss may wait for the reports. Ray usually has an idle worker process on that host; otherwise it starts one."""


def request_crash_report(worker: WorkerHandle) -> None:
    """Start to fetch the crash report of a rank that has ended on another host. Never raises: a loss can be reported without it."""
    if worker.crash_report_call is not None or worker.location is None or worker.location.crash_report_file is None:
        return
    on_that_host = NodeAffinitySchedulingStrategy(worker.location.node, soft=False)
    try:
        task = ray.remote(_read_and_delete).options(num_cpus=0, scheduling_strategy=on_that_host)
        worker.crash_report_call = task.remote(worker.location.crash_report_file)
    except Exception as error:  # Ray may be in no state to run tasks
        logger.warning("no crash report of %s could be requested: %s", worker.name, error)


def fetch_crash_reports(workers: Sequence[WorkerHandle]) -> None:
    """Set `crash_report` of the workers that ended on other hosts without reporting an error. The files there are deleted.

    A host that Ray cannot reach is not waited for beyond `FETCH_S`. Never raises.
    """
    ended = [worker for worker in workers if worker.exit_reason and not worker.failure]
    for worker in ended:
        request_crash_report(worker)
    requested = {worker.crash_report_call: worker for worker in ended if worker.crash_report_call is not None}
    if not requested:
        return
    try:
        done, missing = ray.wait(list(requested), num_returns=len(requested), timeout=FETCH_S)
        for call in done:
            requested[call].crash_report = ray.get(call)
    except Exception as error:  # the host or Ray itself is gone
        logger.warning("a crash report could not be fetched: %s", error)
    else:
        for call in missing:
            logger.warning("no crash report of %s came within %g s", requested[call].name, FETCH_S)


def _read_and_delete(file: str) -> str | None:
    report = crash_report.read(Path(file))
    with suppress(OSError):
        Path(file).unlink()
    return report
