"""What a rank's process leaves when it crashes in native code: the signal, and where its threads were. A file that outlives it.

A process that is killed from outside (SIGKILL: an operator, the kernel for want of memory) leaves none: that tells the two apart.
"""

import faulthandler
import os
import tempfile
from pathlib import Path
from typing import IO

_file: IO[bytes] | None = None


def keep_at(file: Path) -> None:
    """From now on a fatal signal (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT) of this process is told in ``file``, which is made new.

    Whoever handled these signals before does so afterwards: Ray tells of them in its logs.
    """
    global _file
    opened = file.open("wb", buffering=0)
    faulthandler.enable(opened)
    if _file is not None:
        _file.close()
    _file = opened


def new_file(rank: int) -> Path:
    """An empty file that nobody else has, for a rank whose replica is on another host and has no folder here."""
    opened, name = tempfile.mkstemp(prefix=f"manta-rank-{rank}-", suffix=".crash")
    os.close(opened)
    return Path(name)


def read(file: Path) -> str | None:
    """What another process of this host left, Python's own words; None where it did not crash, or kept no note."""
    try:
        return file.read_text(errors="replace").strip() or None
    except OSError:
        return None
