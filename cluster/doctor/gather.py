"""Gathers the facts about this process and its host in well under a second: without importing torch or creating a CUDA context."""

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
from parallel.cpp_build import Unavailable
from parallel.native.variants import built_variant

LIBRARIES = {
    "manta": ("manta",), "torch": ("torch",), "ray": ("ray",), "safetensors": ("safetensors",),
    "nccl": ("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
}  # fmt: skip
"""Name in findings -> distributions that provide it. The CUDA version of torch is part of its version (2.13.0+cu130)."""
QUERY = "index,uuid,name,memory.total,memory.used,driver_version"
SHARED = Path("/dev/shm")  # noqa: S108  (shared memory of NCCL and of the CPU kernels)
CGROUP = Path("/sys/fs/cgroup")
MIB = 2**20


def gather(*, rank: int, address: str | None, cache_folder: Path, open_checkpoint: Callable[[], None] | None = None) -> HostFacts:
    """``address``: that of this host in the cluster. ``open_checkpoint`` raises if the checkpoint cannot be opened from here."""
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
        kernel_variant=_kernel_variant(),
        triton_launcher_problem=triton_launcher_problem(os.environ),
        checkpoint_problem=_problem(open_checkpoint),
    )


def _problem(act: Callable[[], None] | None) -> str | None:
    try:
        if act is not None:
            act()
    except Exception as error:  # any error is the finding
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
    """The GPUs that this process may use."""
    return _nvidia()[1]


def _nvidia() -> tuple[str | None, tuple[GpuFacts, ...]]:
    """The driver's version and the GPUs of this process: nvidia-smi lists all GPUs of the host, CUDA_VISIBLE_DEVICES selects."""
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
    """Parse nvidia-smi's CSV. ``visible``: the value of CUDA_VISIBLE_DEVICES, with indices, UUIDs or their prefixes; None = all GPUs.

    nvidia-smi's list has no MIG instances, and may lack the memory of a GPU that is divided into them.
    """
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
    """Bytes in a cell with MiB; 0 if it is not a number."""
    return int(cell) * MIB if cell.isdigit() else 0


def triton_launcher_problem(environment: Mapping[str, str], include: Path | None = None) -> str | None:
    """What Triton lacks to compile its kernel launcher, unless a compiled one is cached; None if nothing. Every process does so before its
    first kernel on a GPU (`triton.runtime.build`, as of 3.7.1). ``include``: the folder of Python's headers."""
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
    """Available memory of this host and its container. Less strict than `engine.run.host_resources.available_memory_bytes`, because it can
    abort a start."""
    available = int(psutil.virtual_memory().available)
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        pairs = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = next((int(value) for name, value in pairs if name == "inactive_file"), 0)  # counted as used, but reclaimable
        return available if limit == "max" else max(0, min(available, int(limit) - int(used) + cached))
    except (OSError, ValueError):
        return available


def _kernel_variant() -> str | None:
    try:
        return built_variant()
    except Unavailable:
        return None


def _nearest(folder: Path) -> Path:
    """The folder, or the first of those above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
