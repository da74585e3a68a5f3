"""Registry of this user's servers with a private Ray on this machine: a small file for each running server."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.user_cache import cache_folder


@dataclass(frozen=True, kw_only=True)
class LocalServerRecord:
    pid: int
    address: str
    """host:port of its Ray."""
    token: str
    """Path of the token file for joining it; readable by this user only."""
    http: str = ""
    """Base URL."""


@contextmanager
def registered(address: str, token: str, *, http: str) -> Iterator[None]:
    """Keep this process registered while the context is open."""
    note = LocalServerRecord(pid=os.getpid(), address=address, token=token, http=http)
    file = _folder() / f"{note.pid}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.write_text(json.dumps(asdict(note)))
    except OSError:  # the cache is not writable; `manta top` then needs an address
        pass
    try:
        yield
    finally:
        _remove(file)


def running_servers() -> list[LocalServerRecord]:
    """All running servers. Deletes the files of servers that were killed."""
    notes = []
    for file in sorted(_folder().glob("*.json")):
        try:
            note = LocalServerRecord(**json.loads(file.read_text()))
            if Path(f"/proc/{note.pid}").exists() and Path(note.token).exists():
                notes.append(note)
                continue
        except (OSError, ValueError, TypeError):
            pass
        _remove(file)
    return notes


def _remove(file: Path) -> None:
    with suppress(OSError):  # a file system that is read-only says so even of a file that is not there
        file.unlink()


def _folder() -> Path:
    return cache_folder() / "servers"
