"""The fourteen places of a request (docs/architecture.md), told as one log line each; nothing happens unless it is asked for."""

import logging
import os
import time

logger = logging.getLogger("manta.places")

ASKED_FOR = os.environ.get("MANTA_LOG_PLACES", "")
"""``1``: to stderr. Anything else: the path of a file to which all processes of this host append."""

if ASKED_FOR:
    logger.addHandler(logging.StreamHandler() if ASKED_FOR == "1" else logging.FileHandler(ASKED_FOR, mode="a", delay=True))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def is_tracing() -> bool:
    """Whether `trace_place` does anything: to be asked once before it is called for hundreds."""
    return logger.isEnabledFor(logging.DEBUG)


def trace_place(place: int, request_id: str) -> None:
    """Say that a request has come to a place. ``at`` orders the lines of all processes of one host."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("place=%d request=%s at=%d", place, request_id, time.monotonic_ns())
