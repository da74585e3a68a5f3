"""Request headers for what OpenAI's API has no field for."""

import re
from collections.abc import Mapping

from serve.errors import InvalidRequest
from serve.limits import Limits
from serve.validation import check_priority

PRIORITY = "x-priority"
"""An integer, by default 0. Among the requests of one caller, those with lower numbers are served first."""
DEADLINE_MS = "x-deadline-ms"
"""Milliseconds from the request's arrival after which it ends with `deadline_exceeded`."""
TIMING = "x-manta-ledger"
"""`1`: report where the request's time went, in a `Server-Timing` header or in a comment at the end of a stream."""
MAX_DEADLINE_MS = 24 * 60 * 60 * 1000
INTEGER = re.compile(r"-?[0-9]{1,9}")


def priority(headers: Mapping[str, str], limits: Limits) -> int | None:
    """The priority that a header asks for; None if there is no such header.

    Raises:
        InvalidRequest: the header is not such a number.
    """
    given = headers.get(PRIORITY)
    if given is None:
        return None
    return check_priority(int(given) if INTEGER.fullmatch(given) else given, limits, param=PRIORITY)


def deadline_ms(headers: Mapping[str, str]) -> int | None:
    """How long the client waits, by a header; None if there is no such header.

    Raises:
        InvalidRequest: the header is not such a number.
    """
    return _integer(headers, DEADLINE_MS, 1, MAX_DEADLINE_MS)


def wants_timing(headers: Mapping[str, str]) -> bool:
    """Whether a header asks for the timing of the request.

    Raises:
        InvalidRequest: the header is neither 0 nor 1.
    """
    return bool(_integer(headers, TIMING, 0, 1))


def _integer(headers: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    given = headers.get(name)
    if given is None:
        return None
    if not INTEGER.fullmatch(given) or not low <= int(given) <= high:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}", param=name)
    return int(given)
