"""Before an application is removed: its fronts refuse new requests, and the running ones end by themselves, or with an error.

Without this Ray Serve kills its proxies while streams pass through them, and clients see connections that break.
"""

import logging
import threading
from typing import Any

import ray.serve as ray_serve
from ray.serve.handle import DeploymentHandle

from serve.deployment import FRONTS

CALL_S = 5.0
"""How long fronts that do not answer are waited for."""
LAST_EVENTS_S = 0.5
"""How long the last events are given to pass Ray and the proxy, once every front has sent its own."""

logger = logging.getLogger(__name__)


def stop_requests(app: str, *, grace_s: float, hurry: threading.Event) -> None:
    """Let the requests of all fronts of an application run for at most ``grace_s`` more, or until ``hurry`` is set; then end the rest.

    What fails here is only logged: the application is removed in any case.
    """
    done = threading.Event()

    def run() -> None:
        try:
            _stop(ray_serve.get_deployment_handle(FRONTS, app), grace_s, hurry)
        except Exception as error:  # such as: no front runs, or Ray itself has gone
            logger.debug("the fronts could not be told to end their requests: %s", error)
        finally:
            done.set()

    threading.Thread(target=run, name="stop-requests", daemon=True).start()  # a thread, because calls hang if the GCS is gone
    done.wait(grace_s + 3 * CALL_S)


def _stop(fronts: "DeploymentHandle[Any]", grace_s: float, hurry: threading.Event) -> None:
    answers = fronts.broadcast("drain").results(timeout_s=CALL_S, return_exceptions=True)
    num_open = sum(each for each in answers if isinstance(each, int))
    if not num_open:
        return
    if not hurry.is_set():
        logger.warning(
            "%d %s still running and may finish within %g s; a second Ctrl-C ends %s at once",
            num_open,
            *(("request is", grace_s, "it") if num_open == 1 else ("requests are", grace_s, "them")),
        )
    ended = threading.Event()

    def end(grace_s: float) -> None:
        try:
            fronts.broadcast("end_requests", grace_s).results(timeout_s=grace_s + CALL_S, return_exceptions=True)
        except Exception as error:
            logger.debug("a front did not end its requests: %s", error)
        ended.set()

    threading.Thread(target=end, args=(grace_s,), name="end-requests", daemon=True).start()
    while not ended.wait(0.1):
        if hurry.is_set():
            end(0.0)
            break
    threading.Event().wait(LAST_EVENTS_S)
