"""Before an application is removed: its fronts refuse new requests, and the running ones end by themselves, or with an error.

Without this Ray Serve kills its proxies while streams pass through them, and clients see connections that break.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray.serve as ray_serve
from ray.serve.handle import DeploymentHandle

from engine.counted import counted
from serve.deployment import FRONTS
from serve.ray_address import JOB_VARIABLE

CALL_S = 5.0
"""How long fronts that do not answer are waited for."""
DRAIN_AGAIN_S = 2.0
"""How often fronts that may have started meanwhile are told to refuse requests."""
LAST_EVENTS_S, LONGEST_LAST_EVENTS_S = 0.5, 5.0
"""How long the last events are given to pass Ray and the proxy, once every front has sent its own."""
EVENTS_PER_S = 200.0
"""How many of the last events pass a second, by a cautious guess."""

logger = logging.getLogger(__name__)


@contextmanager
def requests_ending(
    app: str, *, grace_s: float, hurry: threading.Event, outlives_process: bool, is_alive: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """On entry, the fronts of an application are told to refuse new requests, and to let the running ones go on for at most ``grace_s``,
    or until ``hurry`` is set; then they end the rest. On exit, this is waited for, while ``is_alive`` says that Ray is there.

    The fronts need nothing else from here, so the application may be deleted meanwhile; it goes on even if this process is killed, unless
    their Ray ends with it (``outlives_process``: it does not). What fails is only logged: the application is removed in any case.
    """
    told, ended = threading.Event(), threading.Event()

    def run() -> None:
        try:
            _end_requests(ray_serve.get_deployment_handle(FRONTS, app), grace_s, hurry, told, outlives_process)
        except Exception as error:  # such as: no front runs, or Ray itself has gone
            logger.debug("the fronts could not be told to end their requests: %s", error)
        finally:
            told.set()
            ended.set()

    threading.Thread(target=run, name="stop-requests", daemon=True).start()  # a thread, because calls hang if the GCS is gone
    _wait(told, 3 * CALL_S, is_alive)
    yield
    _wait(ended, grace_s, lambda: is_alive() and not hurry.is_set())
    _wait(ended, 3 * CALL_S, is_alive)


def _wait(event: threading.Event, limit_s: float, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + limit_s
    while not event.wait(0.2) and is_alive() and time.monotonic() < deadline:
        pass


def still_running(num_open: int, grace_s: float, *, outlives_process: bool, in_job: bool) -> str:
    """What is said of ``num_open`` running requests. Nobody can press Ctrl-C in a Ray job: Ray sends it SIGTERM once, and kills it three
    seconds later (``RAY_JOB_STOP_WAIT_TIME_S``)."""
    them = "it" if num_open == 1 else "them"
    said = f"{counted(num_open, 'request is', 'requests are')} still running and may finish within {grace_s:g} s"
    if not in_job:
        return f"{said}; Ctrl-C ends {them} at once"
    return f"{said}, also after Ray has ended this job" if outlives_process else f"{said}, unless Ray ends this job before"


def _end_requests(
    fronts: "DeploymentHandle[Any]", grace_s: float, hurry: threading.Event, told: threading.Event, outlives_process: bool
) -> None:
    answers = fronts.broadcast("drain").results(timeout_s=CALL_S, return_exceptions=True)
    num_open = sum(each for each in answers if isinstance(each, int))
    if num_open and not hurry.is_set():
        logger.warning("%s", still_running(num_open, grace_s, outlives_process=outlives_process, in_job=JOB_VARIABLE in os.environ))
    response = fronts.broadcast("end_requests", grace_s)
    # Sent now, and can be cancelled. Ray has no public way to either: cancelling what waits for the results does not cancel the calls.
    calls = response._fetch_replica_results_sync(CALL_S)
    told.set()
    ended = threading.Event()

    def await_end() -> None:
        with suppress(Exception):
            response.results(timeout_s=grace_s + CALL_S, return_exceptions=True)
        ended.set()

    threading.Thread(target=await_end, name="end-requests", daemon=True).start()
    drained = time.monotonic()
    while not ended.wait(0.1) and not hurry.is_set():
        if time.monotonic() > drained + DRAIN_AGAIN_S:
            _tell(fronts, "drain", timeout_s=1.0)
            drained = time.monotonic()
    for call in calls:  # fronts of an application that is being deleted take no further calls
        with suppress(Exception):
            call.cancel()
    _tell(fronts, "end_requests", 0.0, timeout_s=CALL_S)  # also to those that have started meanwhile
    threading.Event().wait(min(LAST_EVENTS_S + num_open / EVENTS_PER_S, LONGEST_LAST_EVENTS_S))


def _tell(fronts: "DeploymentHandle[Any]", method: str, *given: Any, timeout_s: float) -> None:
    try:
        fronts.broadcast(method, *given).results(timeout_s=timeout_s, return_exceptions=True)
    except Exception as error:
        logger.debug("not every front was told to %s: %s", method, error)
