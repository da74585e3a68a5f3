"""This user's cache folder: what Manta has fetched, built or measured on this machine, and may fetch, build or measure again."""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_folder() -> Path:
    """``$MANTA_CACHE``; by default ``manta`` in the user's cache folder."""
    return Path(os.environ.get("MANTA_CACHE") or default_cache_folder())


def default_cache_folder() -> Path:
    """The cache folder where MANTA_CACHE is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "manta"


@contextmanager
def in_use(file: Path) -> Iterator[None]:
    """Note that ``file`` is used now, and keep `remove_unused` of other processes from its folder while the context is open."""
    folder = None
    try:
        with suppress(OSError):  # it does not exist, or the file system has no locks
            folder = os.open(file.parent, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_SH)
        with suppress(OSError):  # it does not exist, or belongs to another user
            os.utime(file)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def remove_unused(folders: Path, *, keep: Path, unused_s: float) -> list[Path]:
    """Remove each folder in ``folders``, except ``keep``, in which nothing was written or used (`in_use`) for ``unused_s``.

    Returns the removed folders. One that is in use at this moment, or cannot be removed, stays.
    """
    removed = []
    for folder in sorted(folders.iterdir()) if folders.is_dir() else ():
        if folder == keep or folder.is_symlink() or not folder.is_dir():
            continue
        with suppress(OSError), _alone_in(folder):
            if time.time() - _last_change_s(folder) > unused_s:
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lock a folder.

    Raises:
        OSError: another process is `in_use` of it, or it cannot be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _last_change_s(folder: Path) -> float:
    """Unix time of the latest change of the folder or of anything in it."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
