"""Which folders of the cache go, and which stay."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel.user_cache import cache_folder, in_use, remove_unused

DAY_S = 86_400.0


def version(folders: Path, name: str, *, days: float) -> Path:
    """The file of a version that was last used so many days ago."""
    file = folders / name / "lib.so"
    file.parent.mkdir(parents=True)
    file.touch()
    when = time.time() - days * DAY_S
    for path in (file, file.parent):
        os.utime(path, (when, when))
    return file


def test_what_was_not_used_for_long_goes_and_all_else_stays(tmp_path: Path) -> None:
    old, recent, kept = version(tmp_path, "old", days=31), version(tmp_path, "recent", days=29), version(tmp_path, "kept", days=99)
    used = version(tmp_path, "used", days=99)
    with in_use(used):
        pass
    (tmp_path / "a file").touch()
    (tmp_path / "elsewhere").symlink_to(recent.parent)
    assert remove_unused(tmp_path, keep=kept.parent, unused_s=30 * DAY_S) == [old.parent]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "elsewhere", "kept", "recent", "used"]
    assert used.exists()


def test_what_another_process_is_loading_stays(tmp_path: Path) -> None:
    loading = version(tmp_path, "old", days=99)
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_SH); print('locked', flush=True); input()"
    command = [sys.executable, "-c", code, str(loading.parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        assert remove_unused(tmp_path, keep=tmp_path / "new", unused_s=DAY_S) == []
        other.communicate("\n")
    assert remove_unused(tmp_path, keep=tmp_path / "new", unused_s=DAY_S) == [loading.parent]


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    assert remove_unused(tmp_path / "none", keep=tmp_path, unused_s=0.0) == []
    with in_use(tmp_path / "none" / "lib.so"):
        pass


def test_the_folder_is_the_one_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MANTA_CACHE", raising=False)
    assert cache_folder() == tmp_path / "manta"
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
