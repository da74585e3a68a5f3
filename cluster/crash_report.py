"""Crash reports: when a rank crashes in native code, faulthandler writes the signal and all Python stacks to a file that outlives it.

A process that is killed from outside (SIGKILL by an operator or the OOM killer) leaves none, which tells the two cases apart.
"""

import faulthandler
import os
import tempfile
from pathlib import Path
from typing import IO

_file: IO[bytes] | None = None


def enable(file: Path) -> None:
    """Write a report to ``file`` (truncated now) at a fatal signal (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT) of this process.

    Earlier handlers of these signals still run afterwards; Ray's logs them.
    """
    global _file
    opened = file.open("wb", buffering=0)
    faulthandler.enable(opened)
    if _file is not None:
        _file.close()
    _file = opened


def new_file(rank: int) -> Path:
    """A new temporary file, for a rank whose replica is on another host and has no folder here."""
    opened, name = tempfile.mkstemp(prefix=f"manta-rank-{rank}-", suffix=".crash")
    os.close(opened)
    return Path(name)


def read(file: Path) -> str | None:
    """The report that a process of this host left, as faulthandler wrote it; None if it did not crash or wrote no reports."""
    try:
        return file.read_text(errors="replace").strip() or None
    except OSError:
        return None
