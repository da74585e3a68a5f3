"""Collectives of ranks on one host go through memory that they share: how the ranks of a group agree on that, and map it.

The kernels are those of `parallel.native.shared_memory_collectives`. Where one rank of a group cannot take part, all of them keep to gloo.
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

log = logging.getLogger(__name__)
T = TypeVar("T")

SHARED = Path("/dev/shm")  # noqa: S108  (the memory of this host that has names)


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """What one rank can bring. All ranks see all offers and so come to the same decision."""

    obstacle: str | None
    host: str
    process: tuple[str, int]
    """Which numbering of processes, and its number in it."""
    nonce: str


def open_shared_memory(process_group: dist.ProcessGroup, timeout_s: float) -> SharedMemoryCollectives | None:
    """The shared memory of a group's ranks, or None on every one of them if any cannot take part. The log says why.

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
            log.info("ranks talk over gloo, not through shared memory: %s", obstacle)
        return None
    library = native()
    assert library is not None  # else it were an obstacle
    pidfds = [_pidfd(offer, offers[rank]) for offer in offers]
    spins = SPINS if _cores() >= size else 0
    return SharedMemoryCollectives(library, memory, rank, size, pidfds=pidfds, timeout_s=timeout_s, spins=spins)


def gather_objects(mine: T, process_group: dist.ProcessGroup) -> list[T]:
    """What all ranks of the group bring, in their order; on all of them at the same time."""
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
    place = os.statvfs(SHARED)
    free = place.f_bavail * place.f_frsize
    if free < memory_bytes(size):
        raise Unavailable(
            f"{SHARED} has {free >> 20} MiB free and {size} ranks need {memory_bytes(size) >> 20}; enlarge it (docker: --shm-size)"
        )


def _map(path: Path, rank: int, size: int, process_group: dist.ProcessGroup) -> tuple[str | None, mmap.mmap | None]:
    """Rank 0 makes the file, all map it, and its name is taken away: the memory goes when the last rank does, however it ends."""
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
    """A file whose pages are there already: one that cannot be had later would end a rank by SIGBUS."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, length)
    finally:
        os.close(descriptor)


def _pidfd(peer: _Offer, own: _Offer) -> int:
    """A descriptor that becomes readable when the peer's process ends; -1 if it is ours, or cannot be seen from here."""
    if peer.process == own.process or peer.process[0] != own.process[0]:
        return -1
    try:
        return os.pidfd_open(peer.process[1])
    except OSError:  # the wait's own limit will tell
        return -1


def _cores() -> float:
    """Cores that this process may use, by its affinity and its control group's quota (``cpu.max``: quota and period)."""
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
    place = os.stat(SHARED) if SHARED.exists() else None
    return f"{boot.read_text().strip() if boot.exists() else platform.node()}:{place and (place.st_dev, place.st_ino)}:{os.getuid()}"


def pid_namespace() -> str:
    """In which a process has its number: in another one that number is somebody else's."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return uuid.uuid4().hex  # nobody else's
