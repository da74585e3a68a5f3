"""Which requests belong together, as clients say it: a header of HTTP or gRPC, else the field ``user``."""

import re

from serve.errors import InvalidRequest
from serve.limits import Limits

SESSION = "x-session-id"
"""Requests of one session go to the same replica where that costs little; see `cluster.expected_wait`."""


def session_of(named: str | None, user: str | None, limits: Limits) -> str:
    """ "" where the client names neither.

    Raises:
        InvalidRequest: the header is no identifier.
    """
    if named is None:
        return user or ""
    if len(named) > limits.id_chars or not re.fullmatch(r"[A-Za-z0-9._:-]+", named):
        raise InvalidRequest(f"{SESSION} must be 1 to {limits.id_chars} of A-Z a-z 0-9 . _ : -", param=SESSION)
    return named
