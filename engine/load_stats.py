"""How much a rank read while it loaded its weights."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """Bytes of a checkpoint that one rank read, and how long that took."""

    kept_bytes: int
    """Weights that the rank keeps, as stored."""
    fetched_bytes: int
    """Everything that left the files or the store: also headers, and what lies between the columns that the rank keeps."""
    seconds: float
