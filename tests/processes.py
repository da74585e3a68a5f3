"""Other processes, which may end at any moment: one that ends after it was listed has no name, no command, and need not be killed."""

from collections.abc import Iterable
from contextlib import suppress

import psutil


def name_of(process: psutil.Process) -> str:
    """Empty if the process has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def command_of(process: psutil.Process) -> list[str]:
    """Empty if the process has ended, or is ending."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def named(processes: Iterable[psutil.Process], *beginnings: str) -> list[psutil.Process]:
    """Those whose names begin with one of ``beginnings``."""
    return [process for process in processes if name_of(process).startswith(beginnings)]


def is_alive(process: psutil.Process) -> bool:
    """Not once it has ended, whether or not its parent knows."""
    with suppress(psutil.NoSuchProcess):
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def kill(processes: Iterable[psutil.Process]) -> frozenset[int]:
    """Returns the pids of those that had not ended before."""
    pids = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
            pids.add(process.pid)
    return frozenset(pids)
