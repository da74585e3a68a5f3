"""Registry of this user's servers with a private Ray on this machine: a small file for each running server."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.user_cache import cache_folder


@dataclass(frozen=True, kw_only=True)
class LocalServerRecord:
    pid: int
    address: str
    """host:port of its Ray; "" while that starts."""
    token: str
    """Path of the token file for joining it; readable by this user only."""
    http: str = ""
    """Base URL."""


@contextmanager
def registered(token: str, *, http: str) -> Iterator[Callable[[str], None]]:
    """Keep this process registered while the context is open. Yields a function that takes the address of its Ray, once that is known.

    Registered first, because Ray can be found before its address is known here, and whoever finds it needs the token.
    """
    file = _folder() / f"{os.getpid()}.json"

    def write(address: str) -> None:
        note = LocalServerRecord(pid=os.getpid(), address=address, token=token, http=http)
        scratch = file.with_suffix(".new")
        with suppress(OSError):  # the cache is not writable; `manta top` then needs an address
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            scratch.write_text(json.dumps(asdict(note)))
            scratch.replace(file)  # atomic: a reader deletes what it cannot read

    write("")
    try:
        yield write
    finally:
        _remove(file)


def running_servers() -> list[LocalServerRecord]:
    """All servers that run or start. Deletes the files of servers that were killed."""
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
