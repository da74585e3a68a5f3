"""Servers with a Ray of their own on this machine, known to this user: a small file for each, as long as it runs."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.doctor.gather import cache_folder


@dataclass(frozen=True, kw_only=True)
class LocalServerRecord:
    pid: int
    address: str
    """host:port of its Ray."""
    token: str
    """Path of the file that lets one join it; only this user can read it."""


@contextmanager
def registered(address: str, token: str) -> Iterator[None]:
    """For as long as this process serves."""
    note = LocalServerRecord(pid=os.getpid(), address=address, token=token)
    file = _folder() / f"{note.pid}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.write_text(json.dumps(asdict(note)))
    except OSError:  # a cache that cannot be written to: `manta top` needs an address then
        pass
    try:
        yield
    finally:
        _remove(file)


def running_servers() -> list[LocalServerRecord]:
    """Notes of servers that were killed are swept."""
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
