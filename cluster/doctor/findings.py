"""What a doctor says: one finding, and how grave it is."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    NOTE = "note"
    """It works; this is how."""
    WARNING = "warning"
    """It works, and not as well as it could."""
    FATAL = "fatal"
    """It cannot work, or not for long."""


ORDER = (Severity.FATAL, Severity.WARNING, Severity.NOTE)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was found, in a sentence, and in another what to do about it."""

    severity: Severity
    check: str
    host: str | None
    """The guilty one; None: it is about all."""
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
    """The gravest first."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))
