"""Ends what a server has started, also when the server was killed and could not: ``python -m serve.process_reaper MARK [FOLDER]``.

A process of its own that reads a pipe from the server, its parent; the pipe's end is the server's end, in whatever way.
What the server started is known by descent, noted while it lives (orphans have none), and for the latest arrivals by MARK:
``NAME=value``, with a value that no other server has, in the environment they were started with. (Descent alone misses
processes that appear in the last moment, the environment alone those that have overwritten theirs with a title.)
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
            continue  # another user's, or gone


def descendants_until_end(server: psutil.Process) -> set[psutil.Process]:
    """Wait for the end of the server; all that descended from it and was seen meanwhile."""
    seen: set[psutil.Process] = set()
    while True:
        try:
            seen.update(server.children(recursive=True))
        except psutil.NoSuchProcess:
            break
        ready, _, _ = select.select([sys.stdin], [], [], LOOK_S)
        if ready:  # nothing is ever written, so this is the end of the pipe
            break
    return seen - {psutil.Process()}


def end(seen: set[psutil.Process], mark: str) -> None:
    """Kill until there are none: one that is being started may appear after a first look."""
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
