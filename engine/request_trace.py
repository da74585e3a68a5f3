"""Logs one line for each of the fourteen places a request passes (docs/architecture.md), if `MANTA_LOG_PLACES` is set."""

import logging
import os
import time

logger = logging.getLogger("manta.places")

DESTINATION = os.environ.get("MANTA_LOG_PLACES", "")
"""``1``: stderr. Anything else: the path of a file to which all processes of this host append."""

if DESTINATION:
    logger.addHandler(logging.StreamHandler() if DESTINATION == "1" else logging.FileHandler(DESTINATION, mode="a", delay=True))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def is_tracing() -> bool:
    """Whether `trace_place` does anything. Check once before calling it for hundreds of requests."""
    return logger.isEnabledFor(logging.DEBUG)


def trace_place(place: int, request_id: str) -> None:
    """Log that a request has reached a place. ``at`` orders the lines of all processes of one host."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("place=%d request=%s at=%d", place, request_id, time.monotonic_ns())
