"""A finding of `manta doctor`, and its severity."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    NOTE = "note"
    """Information on something that works."""
    WARNING = "warning"
    """It works, but not as well as it could."""
    FATAL = "fatal"
    """It cannot work, or not for long."""


ORDER = (Severity.FATAL, Severity.WARNING, Severity.NOTE)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem or fact (``found``), and what to do about it (``todo``)."""

    severity: Severity
    check: str
    host: str | None
    """The host that it is about; None if it is about all."""
    found: str
    todo: str = ""
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.host}: {self.sentence}" if self.host else self.sentence

    @property
    def sentence(self) -> str:
        return f"{self.found}; {self.todo}" if self.todo else self.found


def is_fatal(findings: Iterable[Finding]) -> bool:
    return any(finding.severity is Severity.FATAL for finding in findings)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The most severe first."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))
