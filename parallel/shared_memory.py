"""All-reduce through the shared memory of one host, by DeepSpeed's operator; `python -m parallel.shared_memory` builds it.

The operator is compiled once per machine at set-up, never when a rank starts. Its own limits shape this file: a process
can be in one such group only, for life, and the group is all ranks; a rank whose peer has died waits for it for ever,
so the worker that holds the rank must be ended from outside; nothing but plain contiguous tensors is reduced.
"""

import importlib.machinery
import importlib.util
import logging
import os
import platform
import sys
import sysconfig
import uuid
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.compiled import Unavailable, cache_path, compile_to

log = logging.getLogger(__name__)

MODULE = "deepspeed_shm_comm"
SOURCES = ("csrc/cpu/comm/shm_interface.cpp", "csrc/cpu/comm/shm.cpp")
SEGMENT_BYTES = 67 * 2**20
"""What every rank holds in /dev/shm: two small and two large buffers (``allreduce_workspace`` of shm.cpp)."""
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-w", f"-DTORCH_EXTENSION_NAME={MODULE}")
"""OpenMP is left out on purpose: the compiler's own runtime would come beside torch's, with its own threads on the same
cores, and the messages of a decode step are a few KB."""
PIECE_BYTES = 2**20 - 64
"""The longest message that each rank adds up whole by itself (``NAIVE_ALLREDUCE_THRESHOLD`` of shm.cpp)."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARED = Path("/dev/shm")  # noqa: S108  (where the operator's shm_open puts its segments)
NEEDS_AVX512 = "its operator needs a processor with AVX-512BW"
HOW_TO_BUILD = "run `python -m parallel.shared_memory` once on this machine"


@dataclass
class SharedMemory:
    """The one shared-memory group of this process."""

    name: str
    rank: int
    size: int
    calls: int = field(default=0)
    """Reductions so far: the members' buffers alternate with it, so only members with equal counts can go on together."""

    def takes(self, x: Tensor) -> bool:
        """Whether ``x`` is reduced here. Depends on the dtype and the row's length only, never on the number of rows.

        The operator sums whole vectors of 16 in one order of ranks and what is left over in another, which makes a
        difference from three ranks on.
        """
        return x.dtype in DTYPES and (self.size == 2 or (x.dim() > 0 and x.shape[-1] % 16 == 0))

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sum contiguous ``x`` in place over all ranks; half precision is added up in float32."""
        flat = x.view(-1)
        # Longer messages are shared out, each rank adding up a slice that need not begin at a whole vector.
        longest = flat.numel() if self.size == 2 else PIECE_BYTES // flat.element_size()
        for piece in flat.split(min(longest, 2**29)):
            torch.ops.deepspeed.inference_all_reduce_(piece)
            self.calls += 1
        return x


@dataclass(frozen=True, kw_only=True)
class _Offer:
    """What one rank can bring. All ranks see all offers and so come to the same decision."""

    obstacle: str | None
    host: str
    nonce: str
    held: tuple[str, int, int, int] | None
    """Name, rank, size and calls of the group this process is in already."""


_held: SharedMemory | None = None


def agree(process_group: dist.ProcessGroup) -> SharedMemory | None:
    """The shared memory of all ranks, or None on every rank if any of them cannot take part. The log says why."""
    rank, size = process_group.rank(), process_group.size()
    offers: list[_Offer | None] = [None] * size
    dist.all_gather_object(offers, _offer(size), group=process_group)
    known = [offer for offer in offers if offer is not None]
    obstacle = _obstacle(known)
    if obstacle is not None:
        if rank == 0:
            log.info("all-reduce goes over gloo, not shared memory: %s", obstacle)
        return None
    if _held is None:
        _join(known[0].nonce, rank, size, process_group)
    if rank == 0:
        log.info("all-reduce goes through shared memory on this host (%d ranks)", size)
    return _held


def _offer(size: int) -> _Offer:
    held = None if _held is None else (_held.name, _held.rank, _held.size, _held.calls)
    obstacle = None
    try:
        _check_host(size)
        _load()
    except (Unavailable, OSError, ImportError) as error:
        obstacle = str(error)
    return _Offer(obstacle=obstacle, host=_host(), nonce=uuid.uuid4().hex, held=held)


def _obstacle(offers: list[_Offer]) -> str | None:
    for rank, offer in enumerate(offers):
        if offer.obstacle is not None:
            return f"rank {rank}: {offer.obstacle}"
        if offer.host != offers[0].host:
            return f"rank {rank} has not the same /dev/shm as rank 0"
    groups = {None if o.held is None else (o.held[0], o.held[2], o.held[3]) for o in offers}
    if len(groups) > 1 or any(o.held is not None and o.held[1:3] != (rank, len(offers)) for rank, o in enumerate(offers)):
        return "a rank's process is in another shared-memory group, and can be in one only; start the ranks in new processes"
    return None


def _check_host(size: int) -> None:
    if not SHARED.is_dir() or not os.access(SHARED, os.W_OK):
        raise Unavailable(f"{SHARED} is not there or not writable")
    cores = _cores()
    if cores < size:
        raise Unavailable(f"{size} ranks would wait busily for each other on {cores:g} cores")
    place = os.statvfs(SHARED)
    free = place.f_bavail * place.f_frsize
    if _held is None and free < size * SEGMENT_BYTES:
        raise Unavailable(
            f"{SHARED} has {free >> 20} MiB free and {size} ranks need {size * SEGMENT_BYTES >> 20}; enlarge it (docker: --shm-size)"
        )


def _cores() -> float:
    """Cores that this process may use, by its affinity and its control group's quota (``cpu.max``: quota and period)."""
    cores = float(len(os.sched_getaffinity(0)))
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.exists():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) / int(period))
    return cores


def _host() -> str:
    """Equal exactly for processes that see the same /dev/shm as the same user."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    place = os.stat(SHARED) if SHARED.exists() else None
    return f"{boot.read_text().strip() if boot.exists() else platform.node()}:{place and (place.st_dev, place.st_ino)}:{os.getuid()}"


def _join(nonce: str, rank: int, size: int, process_group: dist.ProcessGroup) -> None:
    """Map everyone's segment.

    The operator names segments ``deepspeed_allreduce_buffer_<user>_<MASTER_ADDR>_<MASTER_PORT>_<rank>``: a nonce for
    the address keeps replicas on one host apart. It never removes them either; once all are mapped the names are not
    needed, and without names the memory goes when the last rank does, however it ends.
    """
    global _held
    name = f"manta-{nonce}"
    with _environment(MASTER_ADDR=name, MASTER_PORT="0", LOCAL_SIZE=str(size)):
        _load().initialize(size, rank)
    dist.barrier(group=process_group)
    (SHARED / f"deepspeed_allreduce_buffer_{os.getuid()}_{name}_0_{rank}").unlink()
    _held = SharedMemory(name, rank, size)


class _environment:  # noqa: N801  (read as a verb phrase: with _environment(...))
    """Set variables for the length of a block."""

    def __init__(self, **variables: str) -> None:
        self.variables = variables

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)

    def __exit__(self, *exception: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_module: Any = None


def _load() -> Any:
    """The built operator's module. Loaded from its file: importing DeepSpeed itself takes seconds."""
    global _module
    if "avx512bw" not in Path("/proc/cpuinfo").read_text():
        raise Unavailable(NEEDS_AVX512)
    if _module is None:
        path = built_path()
        if not path.exists():
            raise Unavailable(f"its operator is not built; {HOW_TO_BUILD}")
        loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
        spec = importlib.util.spec_from_loader(MODULE, loader)
        assert spec is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        _module = module
    if _module.vector_kernel_level() < 2:
        raise Unavailable(NEEDS_AVX512)
    return _module


def is_built() -> bool:
    try:
        return built_path().exists()
    except Unavailable:
        return False


def built_path() -> Path:
    """Where the operator lies once built: one place for each version of everything it is built from and against.

    Raises:
        Unavailable: DeepSpeed is not installed.
    """
    parts = [part.encode() for part in (version("torch"), sys.implementation.cache_tag, platform.machine(), *FLAGS)]
    return cache_path("shared_memory", [*parts, *(source.read_bytes() for source in _sources())], f"{MODULE}.so")


def _sources() -> list[Path]:
    try:
        version("deepspeed")
        spec = importlib.util.find_spec("deepspeed")
    except PackageNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable("DeepSpeed, whose source holds the operator, is not installed")
    return [Path(spec.submodule_search_locations[0]) / "ops" / source for source in SOURCES]


def build() -> Path:
    """Compile the operator, which takes a minute or two, unless that has been done.

    Raises:
        Unavailable: what is missing on this machine, or what the compiler said.
    """
    target = built_path()
    if not target.exists() and not Path(sysconfig.get_path("include"), "Python.h").exists():
        raise Unavailable(f"no Python.h in {sysconfig.get_path('include')}; install the headers of this Python (python3-dev)")
    return compile_to(target, _command)


def _command(compiler: str, output: Path) -> list[str]:
    from torch.utils import cpp_extension  # imports setuptools: not for ranks

    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    libraries = cpp_extension.library_paths()
    return [
        compiler,
        *FLAGS,
        *(f"-I{path}" for path in includes),
        *(str(source) for source in _sources()),
        *("-o", str(output)),
        *(flag for path in libraries for flag in (f"-L{path}", f"-Wl,-rpath,{path}")),
        *("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
    ]


def main() -> int:
    if is_built():
        print(f"The shared-memory all-reduce is built: {built_path()}")
        return 0
    print("Building the shared-memory all-reduce (DeepSpeed's operator), one or two minutes ...", flush=True)
    try:
        print(f"Built: {build()}")
    except Unavailable as reason:
        print(f"Not built: {reason}\nManta works without it; ranks on one CPU host then talk over gloo, which is slower.")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
