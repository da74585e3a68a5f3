"""What a client may say of a request in headers of its own, because OpenAI's API has no field for it."""

import re
from collections.abc import Mapping

from serve.errors import InvalidRequest

PRIORITY = "x-priority"
"""A whole number; of one caller's requests the lower are served first. 0 unless it is said."""
DEADLINE_MS = "x-deadline-ms"
"""Milliseconds from the request's arrival after which its client no longer wants it; it then ends with `deadline_exceeded`."""
LEDGER = "x-manta-ledger"
"""`1`: tell where the request's time went, as a `Server-Timing` header, or as a comment at the end of a stream."""
MAX_PRIORITY = 1_000
MAX_DEADLINE_MS = 24 * 60 * 60 * 1000
WHOLE = re.compile(r"-?[0-9]{1,9}")


def priority(headers: Mapping[str, str]) -> int | None:
    """
    Raises:
        InvalidRequest: it is no such number.
    """
    return _whole(headers, PRIORITY, -MAX_PRIORITY, MAX_PRIORITY)


def deadline_ms(headers: Mapping[str, str]) -> int | None:
    """
    Raises:
        InvalidRequest: it is no such number.
    """
    return _whole(headers, DEADLINE_MS, 1, MAX_DEADLINE_MS)


def wants_ledger(headers: Mapping[str, str]) -> bool:
    """
    Raises:
        InvalidRequest: it is neither 0 nor 1.
    """
    return bool(_whole(headers, LEDGER, 0, 1))


def _whole(headers: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    given = headers.get(name)
    if given is None:
        return None
    if not WHOLE.fullmatch(given) or not low <= int(given) <= high:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}", param=name)
    return int(given)
