"""Compiles C++ libraries into a per-user cache: once per machine at set-up, never when a rank starts."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from parallel.user_cache import cache_folder


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


def compile_to(target: Path, command: Callable[[str, Path], list[str]]) -> Path:
    """Compile ``target`` unless it exists. ``command`` returns the command line, given the compiler and the output file.

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
        output = Path(folder) / target.name
        done = subprocess.run(command(compiler, output), capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise Unavailable(f"{compiler} failed:\n{done.stderr[-4000:]}")
        output.replace(target)  # atomic: other processes see the whole file or none
    return target
