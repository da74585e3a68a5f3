"""Facts about one rank's process and its host. `cluster.doctor.gather` gathers them, `cluster.doctor.checks` evaluates them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """One GPU that the process sees."""

    index: int
    name: str
    total_bytes: int
    """0 if nvidia-smi does not report it, as for a MIG instance."""
    used_bytes: int
    """Memory in use by any process, before this one allocates."""


@dataclass(frozen=True, kw_only=True)
class InterfaceFacts:
    """The network interface that has the host's address in the cluster."""

    name: str
    address: str
    is_up: bool
    speed_mbit: int
    """0 if unknown."""


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """One rank's process on its host."""

    host: str
    rank: int
    python: str
    versions: dict[str, str]
    """Library name -> version: torch, ray, nccl, ... Libraries that are not installed are left out."""
    driver: str | None
    """Version of the NVIDIA driver; None if there is none."""
    gpus: tuple[GpuFacts, ...]
    interface: InterfaceFacts | None
    cores: int
    memory_available_bytes: int
    shm_total_bytes: int
    shm_free_bytes: int
    cache_folder: str
    cache_free_bytes: int
    open_files_limit: int
    compiler: str | None
    kernel_variant: str | None
    """The variant of the CPU kernels (`parallel.native.variants`) that this process would load; None if none is built for this processor.
    They include the collectives through shared memory."""
    triton_launcher_problem: str | None = None
    """Why Triton cannot compile its kernel launcher, which it does once on each host with GPUs; None if it can."""
    checkpoint_problem: str | None = None
    """Why the checkpoint cannot be opened from this host; None if it can."""
    clock_ahead_at_least_s: float = 0.0
    """By how much this host's clock is provably ahead of the caller's (negative: behind)."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the ranks will need."""

    device: str = "cpu"
    """"cpu" or "cuda"."""
    gpus_per_rank: float = 0.0
    weights_bytes: int = 0
    """Weights of the largest rank, in the format in which it will hold them."""
    cache_bytes: int = 0
    """Disk space in the cache folder."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Sets of ranks that all-reduce in every layer, for tensor parallelism or within an expert."""


def clock_ahead(*, asked_s: float, began_s: float, ended_s: float, answered_s: float) -> float:
    """By how much another clock is provably ahead of ours. ``asked_s`` and ``answered_s`` are by our clock, the others by the other clock.

    The other side began after we asked and ended before we had the answer; its clock is off by what it shows outside of that interval.
    """
    if began_s < asked_s:
        return began_s - asked_s
    return max(0.0, ended_s - answered_s)
