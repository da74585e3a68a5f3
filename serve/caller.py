"""Step 2 of a request: who asks, and what that one may do."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a key is good for. None of them holds another."""

    INFER = "infer"
    """Ask the models."""
    ADMIN = "admin"
    """See inside and steer: load, drain, abort."""
    METRICS = "metrics"
    """Read /metrics."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How much one key may ask. None = no limit of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts and answers together."""
    concurrency: int | None = None
    """Requests at the same time."""

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The owner of a key."""

    id: str
    """The key's public name; empty where nobody is asked for a key."""
    scopes: frozenset[Scope]
    quota: Quota = Quota()
    share: float = 1.0
    """Of the engine, relative to the other keys that want it at the same time."""

    @property
    def salt(self) -> str:
        """Keeps this caller's cached prefixes from others: whether a prompt is cached would tell that somebody else has sent it."""
        return hashlib.sha256(b"manta prefix salt\0" + self.id.encode()).hexdigest()[:32] if self.id else ""


ANYONE = Caller(id="", scopes=frozenset(Scope))
"""Where no keys are configured."""
