"""Sets up shared memory for the collectives of ranks on one host: the ranks of a group agree on it and map it.

The kernels are in `parallel.native.shared_memory_collectives`. If one rank of a group cannot take part, all of them use gloo.
"""

import logging
import mmap
import os
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from parallel.cpp_build import Unavailable
from parallel.native.library import HOW_TO_BUILD, native
from parallel.native.shared_memory_collectives import SPINS, SharedMemoryCollectives, memory_bytes

logger = logging.getLogger(__name__)
T = TypeVar("T")

SHARED = Path("/dev/shm")  # noqa: S108  (POSIX shared memory)


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """What one rank can contribute. All ranks see all offers, and so make the same decision."""

    obstacle: str | None
    host: str
    process: tuple[str, int]
    """PID namespace and PID."""
    nonce: str


def open_shared_memory(process_group: dist.ProcessGroup, timeout_s: float) -> SharedMemoryCollectives | None:
    """Open shared-memory collectives for a group; None on every rank, with the reason in the log, if any rank cannot take part.

    All members must call this. ``timeout_s`` bounds each later wait for a peer.
    """
    rank, size = process_group.rank(), process_group.size()
    offers = gather_objects(_offer(size), process_group)
    obstacle = _obstacle(offers)
    memory: mmap.mmap | None = None
    if obstacle is None:
        obstacle, memory = _map(SHARED / f"manta-{offers[0].nonce}", rank, size, process_group)
    if obstacle is not None or memory is None:
        if rank == 0:
            logger.info("ranks talk over gloo, not through shared memory: %s", obstacle)
        return None
    library = native()
    assert library is not None  # else there would be an obstacle
    pidfds = [_pidfd(offer, offers[rank]) for offer in offers]
    spins = SPINS if _cores() >= size else 0
    return SharedMemoryCollectives(library, memory, rank, size, pidfds=pidfds, timeout_s=timeout_s, spins=spins)


def gather_objects(mine: T, process_group: dist.ProcessGroup) -> list[T]:
    """All-gather of Python objects, in rank order. All members must call this at the same time."""
    found: list[T | None] = [None] * process_group.size()
    dist.all_gather_object(found, mine, group=process_group)
    return [one for one in found if one is not None]


def _offer(size: int) -> _Offer:
    obstacle = None
    try:
        _check_host(size)
    except (Unavailable, OSError) as error:
        obstacle = str(error)
    return _Offer(obstacle=obstacle, host=host_of_this_process(), process=(pid_namespace(), os.getpid()), nonce=uuid.uuid4().hex)


def _obstacle(offers: list[_Offer]) -> str | None:
    for rank, offer in enumerate(offers):
        if offer.obstacle is not None:
            return f"rank {rank}: {offer.obstacle}"
        if offer.host != offers[0].host:
            return f"rank {rank} has not the same /dev/shm as rank 0"
    return None


def _check_host(size: int) -> None:
    if native() is None:
        raise Unavailable(f"the CPU kernels are not there; {HOW_TO_BUILD}")
    if not SHARED.is_dir() or not os.access(SHARED, os.W_OK):
        raise Unavailable(f"{SHARED} is not there or not writable")
    status = os.statvfs(SHARED)
    free = status.f_bavail * status.f_frsize
    if free < memory_bytes(size):
        raise Unavailable(
            f"{SHARED} has {free >> 20} MiB free and {size} ranks need {memory_bytes(size) >> 20}; enlarge it (docker: --shm-size)"
        )


def _map(path: Path, rank: int, size: int, process_group: dist.ProcessGroup) -> tuple[str | None, mmap.mmap | None]:
    """Rank 0 creates the file, all ranks map it, and it is unlinked: the memory is freed with the last rank, however that ends."""
    problem, memory = None, None
    try:
        if rank == 0:
            _make(path, memory_bytes(size))
    except OSError as error:
        problem = str(error)
    problem = gather_objects((problem,), process_group)[0][0]
    if problem is None:
        try:
            with path.open("r+b") as file:
                memory = mmap.mmap(file.fileno(), memory_bytes(size))
        except OSError as error:
            problem = str(error)
    problems = [f"rank {rank}: {one}" for rank, (one,) in enumerate(gather_objects((problem,), process_group)) if one]
    if rank == 0:
        path.unlink(missing_ok=True)
    return problems[0] if problems else None, memory


def _make(path: Path, length: int) -> None:
    """Create a file with all pages allocated: a page that cannot be allocated later would end a rank with SIGBUS."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, length)
    finally:
        os.close(descriptor)


def _pidfd(peer: _Offer, own: _Offer) -> int:
    """A descriptor that becomes readable when the peer's process ends; -1 for this process, or if the peer is not visible from here."""
    if peer.process == own.process or peer.process[0] != own.process[0]:
        return -1
    try:
        return os.pidfd_open(peer.process[1])
    except OSError:  # then only the timeout detects its end
        return -1


def _cores() -> float:
    """Cores that this process may use, by its affinity and its cgroup's quota (``cpu.max``: quota and period)."""
    cores = float(len(os.sched_getaffinity(0)))
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.exists():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return cores


def host_of_this_process() -> str:
    """Equal exactly for processes that see the same /dev/shm as the same user."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    status = os.stat(SHARED) if SHARED.exists() else None
    return f"{boot.read_text().strip() if boot.exists() else platform.node()}:{status and (status.st_dev, status.st_ino)}:{os.getuid()}"


def pid_namespace() -> str:
    """Identifies this process's PID namespace; a PID is valid only within it."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return uuid.uuid4().hex  # equal to no other
