"""The fourteen places of a request (docs/architecture.md), told as one log line each; nothing happens unless it is asked for."""

import logging
import os
import sys
import time

logger = logging.getLogger("manta.places")

if os.environ.get("MANTA_LOG_PLACES") == "1":
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.DEBUG)


def mark(place: int, request_id: str) -> None:
    """Say that a request has come to a place. ``at`` orders the lines of all processes of one host."""
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("place=%d request=%s at=%d", place, request_id, time.monotonic_ns())
