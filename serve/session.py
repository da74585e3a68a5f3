"""Which requests belong to one session: by a header of HTTP or gRPC, else by a field of the body (`serve.http.schema.ModelBody`)."""

import hashlib

from serve.errors import InvalidRequest
from serve.limits import Limits, is_identifier

SESSION_HEADER = "x-session-id"
"""Requests of one session go to the same replica where that costs little; see `cluster.expected_wait`."""


def parse_session_id(header: str | None, fallback: str | None, limits: Limits) -> str:
    """The session id; "" if the client sends neither. ``fallback`` may be any text: if it is not an identifier, its digest is used.

    Raises:
        InvalidRequest: the header is not an identifier.
    """
    if header is None:
        if not fallback or is_identifier(fallback, limits):
            return fallback or ""
        return hashlib.sha256(fallback.encode(errors="replace")).hexdigest()
    if not is_identifier(header, limits):
        raise InvalidRequest(f"{SESSION_HEADER} must be 1 to {limits.id_chars} of A-Z a-z 0-9 . _ : -", param=SESSION_HEADER)
    return header
