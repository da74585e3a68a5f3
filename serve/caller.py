"""Place 2 of a request: the caller and what it may do."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a key allows. No scope includes another."""

    INFER = "infer"
    """Use the models."""
    ADMIN = "admin"
    """The admin calls: load, drain, abort."""
    METRICS = "metrics"
    """Read /metrics."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How much one key may ask for. None: no limit of its own."""

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
    """The key's public name; empty if the server has no keys."""
    scopes: frozenset[Scope]
    quota: Quota = Quota()
    share: float = 1.0
    """Weight in the engine's fair scheduling, relative to the other keys that have requests at the same time."""

    @property
    def salt(self) -> str:
        """Separates this caller's cached prefixes from those of others, who could otherwise find out whether it has sent a prompt."""
        return hashlib.sha256(b"manta prefix salt\0" + self.id.encode()).hexdigest()[:32] if self.id else ""


ANONYMOUS = Caller(id="", scopes=frozenset(Scope))
"""The caller of every request if no keys are configured."""
