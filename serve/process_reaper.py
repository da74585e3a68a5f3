"""Kill the processes that a server started, even if the server itself was killed: ``python -m serve.process_reaper MARK [FOLDER]``.

This is a separate process with a pipe from the server, its parent; the pipe closes when the server ends, for whatever reason.
The server's processes are found in two ways: as its descendants, recorded while it lives (orphans no longer have a parent), and by
MARK, ``NAME=value`` in their initial environment with a value that is unique to the server. (Descendants alone would miss processes
that start at the last moment; the environment alone would miss those that overwrote theirs with a process title.)
"""

import os
import select
import shutil
import sys
import time
from collections.abc import Iterator

import psutil

LOOK_S = 1.0
PATIENCE_S = 8.0


def processes_with_mark(mark: str) -> Iterator[psutil.Process]:
    """This user's processes that were started with ``mark`` in their environment."""
    name, _, value = mark.partition("=")
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                yield process
        except psutil.Error:
            continue  # of another user, or already gone


def descendants_until_end(server: psutil.Process) -> set[psutil.Process]:
    """Wait until the server ends; returns all of its descendants that were seen until then."""
    seen: set[psutil.Process] = set()
    while True:
        try:
            seen.update(server.children(recursive=True))
        except psutil.NoSuchProcess:
            break
        ready, _, _ = select.select([sys.stdin], [], [], LOOK_S)
        if ready:  # nothing is ever written to the pipe, so this is its end
            break
    return seen - {psutil.Process()}


def end(seen: set[psutil.Process], mark: str) -> None:
    """Kill processes until none are left: one that is just starting may only be found by a later pass."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        living = [process for process in seen | set(processes_with_mark(mark)) if _lives(process)]
        if not living:
            return
        for process in living:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(living, timeout=1)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main() -> None:
    mark, folders = sys.argv[1], sys.argv[2:]
    end(descendants_until_end(psutil.Process(os.getppid())), mark)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
