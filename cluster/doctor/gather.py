"""Facts of this process and its host, in well under a second: torch is not imported, no CUDA context is made."""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from cluster.doctor.facts import GpuFacts, HostFacts, InterfaceFacts

LIBRARIES = {
    "manta": ("manta",), "torch": ("torch",), "ray": ("ray",), "safetensors": ("safetensors",),
    "nccl": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
}  # fmt: skip
"""Name in a finding -> distributions that bring it. Which CUDA torch was built for is part of its version (2.13.0+cu130)."""
QUERY = "index,uuid,name,memory.total,memory.used,driver_version"
SHARED = Path("/dev/shm")  # noqa: S108  (where NCCL and our CPU kernels put what ranks of a host share)
CGROUP = Path("/sys/fs/cgroup")
MIB = 2**20


def gather(*, rank: int, address: str | None, cache_folder: Path, open_checkpoint: Callable[[], None] | None = None) -> HostFacts:
    """``address`` is this host's in the cluster. ``open_checkpoint`` raises if it cannot be opened from here."""
    shm, cache = shutil.disk_usage(SHARED), shutil.disk_usage(_nearest(cache_folder))
    driver, gpus = _nvidia()
    return HostFacts(
        host=socket.gethostname(),
        rank=rank,
        python=platform.python_version(),
        versions={name: found for name, distributions in LIBRARIES.items() if (found := _version(distributions))},
        driver=driver,
        gpus=gpus,
        interface=_interface(address),
        cores=len(os.sched_getaffinity(0)),
        memory_available_bytes=_memory_available(),
        shm_total_bytes=shm.total,
        shm_free_bytes=shm.free,
        cache_folder=str(cache_folder),
        cache_free_bytes=cache.free,
        open_files_limit=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        compiler=next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None),
        shared_memory_built=_shared_memory_built(),
        triton_launcher_problem=triton_launcher_problem(os.environ),
        checkpoint_problem=_problem(open_checkpoint),
    )


def _problem(act: Callable[[], None] | None) -> str | None:
    try:
        if act is not None:
            act()
    except Exception as error:  # whatever it is, it is what there is to say
        return f"{type(error).__name__}: {error}"
    return None


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def gpus_here() -> tuple[GpuFacts, ...]:
    """Those that this process may use."""
    return _nvidia()[1]


def _nvidia() -> tuple[str | None, tuple[GpuFacts, ...]]:
    """Driver and the GPUs of this process (nvidia-smi lists all of the host; CUDA_VISIBLE_DEVICES says which are ours)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, ()
    try:
        command = [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
        out = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout  # noqa: S603  (found on the path)
    except (subprocess.SubprocessError, OSError):
        return None, ()
    return parse_gpus(out, os.environ.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(listing: str, visible: str | None) -> tuple[str | None, tuple[GpuFacts, ...]]:
    """From nvidia-smi's CSV. ``visible``: indices or UUIDs (or their beginnings), in the CUDA library's syntax; None = all. Parts of GPUs
    (MIG) have UUIDs that it does not list, and of a GPU that is in parts it may not say how much memory that has."""
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == QUERY.count(",")]
    wanted = None if visible is None else [item.strip() for item in visible.split(",") if item.strip()]
    gpus = [
        GpuFacts(index=int(index), name=name, total_bytes=_mib_in(total), used_bytes=_mib_in(used))
        for index, uuid, name, total, used, _ in rows
        if wanted is None or any(item == index or uuid.startswith(item) for item in wanted)
    ]
    parts = [item for item in wanted or () if item.startswith("MIG-")]
    gpus += [GpuFacts(index=number, name=part, total_bytes=0, used_bytes=0) for number, part in enumerate(parts)]
    return (rows[0][5] if rows else None), tuple(gpus)


def _mib_in(cell: str) -> int:
    """Bytes; 0 where there is no number."""
    return int(cell) * MIB if cell.isdigit() else 0


def triton_launcher_problem(environment: Mapping[str, str], include: Path | None = None) -> str | None:
    """What Triton lacks (read in 3.7.1, `triton.runtime.build`) to compile its launcher, unless it has one that it kept: every process on a
    GPU does so before its first kernel. ``include``: where Python's headers would lie."""
    if find_spec("triton") is None or any(_triton_cache(environment).glob("*/cuda_utils*.so")):
        return None
    if not environment.get("CC") and not any(shutil.which(name, path=environment.get("PATH", "")) for name in ("gcc", "clang")):
        return "there is no C compiler"
    include = include or Path(sysconfig.get_path("include", "posix_prefix"))
    return None if (include / "Python.h").is_file() else f"there is no {include}/Python.h"


def _triton_cache(environment: Mapping[str, str]) -> Path:
    own, home = environment.get("TRITON_CACHE_DIR"), environment.get("TRITON_HOME")
    return Path(own) if own else Path(home or Path.home()) / ".triton" / "cache"


def _interface(address: str | None) -> InterfaceFacts | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.split("%")[0] == address for each in addresses):
            stats = psutil.net_if_stats().get(name)
            up, speed = (stats.isup, stats.speed) if stats else (False, 0)
            return InterfaceFacts(name=name, address=str(address), is_up=up, speed_mbit=max(speed, 0))
    return None


def _memory_available(cgroup: Path = CGROUP) -> int:
    """Of this host and its container. `engine.run.host_resources.available_memory_bytes` is stricter; this one may end a start."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        pairs = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = next((int(value) for name, value in pairs if name == "inactive_file"), 0)  # counted as used, and given up when wanted
        return available if limit == "max" else max(0, min(available, int(limit) - int(used) + cached))
    except (OSError, ValueError):
        return available


def _shared_memory_built() -> bool:
    """Whether kernels lie where `parallel.native.library.built_path` has them; whether the right ones is seen when ranks join."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return any((cache / "manta" / "native").glob("*/*.so"))


def cache_folder() -> Path:
    """As `model.checkpoint_folder.cache_folder`, which comes with torch."""
    own = os.environ.get("MANTA_CACHE")
    return Path(own or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "manta"))


def _nearest(folder: Path) -> Path:
    """The folder, or the first of those above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
