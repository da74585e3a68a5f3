"""Which requests belong together, as clients say it: a header of HTTP or gRPC, else a field of the body (see `NamedBody.belongs_to`)."""

import hashlib

from serve.errors import InvalidRequest
from serve.limits import Limits, is_identifier

SESSION = "x-session-id"
"""Requests of one session go to the same replica where that costs little; see `cluster.expected_wait`."""


def session_of(named: str | None, otherwise: str | None, limits: Limits) -> str:
    """``otherwise`` may be any text, and counts by its digest where it is no identifier. "" where the client says neither.

    Raises:
        InvalidRequest: the header is no identifier.
    """
    if named is None:
        if not otherwise or is_identifier(otherwise, limits):
            return otherwise or ""
        return hashlib.sha256(otherwise.encode(errors="replace")).hexdigest()
    if not is_identifier(named, limits):
        raise InvalidRequest(f"{SESSION} must be 1 to {limits.id_chars} of A-Z a-z 0-9 . _ : -", param=SESSION)
    return named
