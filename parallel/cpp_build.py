"""Compiles C++ libraries into a per-user cache: once per machine at set-up, never when a rank starts."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parallel.user_cache import cache_folder

MAX_COMPILERS = 8
"""Compilers at a time; each takes up to half a gigabyte of memory (g++ 12)."""


class Unavailable(Exception):
    """A native library or facility cannot be built or used on this machine; the message says why."""


def version_of(parts: Iterable[bytes]) -> str:
    """A hash of everything that a library is built from and against."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def cache_path(name: str, version: str, file: str) -> Path:
    """Path of ``file`` in this user's cache, separate for every version."""
    return cache_folder() / name / version / file


def compile_to(target: Path, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Compile the shared library ``target`` unless it exists: sources in parallel, each by itself, then linked. The ``flags`` are for both.

    Raises:
        Unavailable: what is missing on this machine, or the compiler's output.
    """
    if sys.platform != "linux":
        raise Unavailable(f"it is for Linux, and this is {sys.platform}")
    if target.exists():
        return target
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise Unavailable("no C++ compiler found; install g++ or set CXX")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        output = Path(folder) / target.name
        with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MAX_COMPILERS)) as pool:  # each starts a process and waits for it
            commands = [[compiler, *flags, "-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True)]
            list(pool.map(_run, commands))
        _run([compiler, *flags, "-shared", *objects, "-o", str(output)])
        output.replace(target)  # atomic: other processes see the whole file or none
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise Unavailable(f"{command[0]} failed:\n{done.stderr[-4000:]}")
