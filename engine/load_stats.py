"""What a rank read while it loaded."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadStats:
    """Bytes of a checkpoint that one rank read, and how long that took."""

    kept_bytes: int
    """Of weights, as stored."""
    fetched_bytes: int
    """That left the files or the store for it: with headers, and with what lies between the columns it keeps."""
    seconds: float
