"""The checks of `manta doctor`: pure functions from the facts of all ranks and their needs to findings."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from cluster.doctor.facts import GpuFacts, HostFacts, Need
from cluster.doctor.findings import Finding, Severity, ordered

GIB, MIB = 2**30, 2**20
SHARED = "/dev/shm"  # noqa: S108  (a name for messages)
Facts = Sequence[HostFacts]
Check = Callable[[Facts, Need], Iterator[Finding]]
T = TypeVar("T")

SEGMENT_BYTES = 12 * MIB
"""Bytes of /dev/shm per rank on CPUs: 2 MiB (`parallel.native.shared_memory_collectives.memory_bytes`) in each of at most six groups."""
NCCL_SHM_BYTES = 64 * MIB
"""Bytes of /dev/shm for NCCL's buffers, roughly, for each rank that shares a host. With less NCCL fails with "unhandled system error"."""
CLOCK_WARNING_S, CLOCK_FATAL_S = 0.5, 30.0
"""Deadlines are sent as durations and do not depend on clocks, but logs and traces are compared by time, and tokens and certificates
expire by it."""
OPEN_FILES = 4096
MUST_AGREE = ("manta", "torch", "ray", "nccl")
GPU_BUSY_FRACTION = 0.05
SLOW_MBIT = 10_000


def examine(facts: Facts, need: Need) -> list[Finding]:
    """All findings, the most severe first."""
    return ordered(finding for check in CHECKS for finding in check(facts, need))


def _versions(facts: Facts, need: Need) -> Iterator[Finding]:
    """Fatal, because ranks of different versions disagree about messages and collectives, or hang in them."""
    for name in MUST_AGREE:
        yield from _must_agree(facts, name, [each.versions.get(name) for each in facts])
    yield from _must_agree(facts, "Python", [_minor(each.python) for each in facts])


def _driver(facts: Facts, need: Need) -> Iterator[Finding]:
    drivers = [each.driver for each in facts]
    if need.device == "cuda":
        for finding in _must_agree(facts, "the NVIDIA driver", drivers):
            yield Finding(severity=Severity.WARNING, check="driver", host=finding.host, ranks=finding.ranks, found=finding.found,
                          todo="install the same driver on every host")  # fmt: skip


def _gpus(facts: Facts, need: Need) -> Iterator[Finding]:
    if need.device != "cuda":
        return
    for each in _fewest_gpus_by_host(facts, need):
        yield Finding(
            severity=Severity.FATAL, check="gpu", host=each.host, ranks=(each.rank,),
            found=f"rank {each.rank} is to have {need.gpus_per_rank:g} GPU and sees {len(each.gpus)}",
            todo="check that nvidia-smi works there, that the container is given GPUs, and resources.gpus",
        )  # fmt: skip
    for each, gpu in _once_per_gpu(facts):
        if not gpu.total_bytes:  # unknown
            continue
        if gpu.used_bytes > GPU_BUSY_FRACTION * gpu.total_bytes:
            yield Finding(
                severity=Severity.WARNING, check="gpu", host=each.host, ranks=(each.rank,),
                found=f"GPU {gpu.index} ({gpu.name}) has {_gib(gpu.used_bytes)} of {_gib(gpu.total_bytes)} taken already",
                todo="end what uses it (nvidia-smi shows it), or there will be so much less room for KV",
            )  # fmt: skip
        free = gpu.total_bytes - gpu.used_bytes
        if free < need.weights_bytes:
            yield Finding(
                severity=Severity.FATAL, check="memory", host=each.host, ranks=(each.rank,),
                found=f"GPU {gpu.index} ({gpu.name}) has {_gib(free)} free and a rank's weights need {_gib(need.weights_bytes)}",
                todo="use more ranks (`manta plan` lists layouts that fit) or free the GPU",
            )  # fmt: skip


def _same_processors(facts: Facts, need: Need) -> Iterator[Finding]:
    """Fatal on GPUs: kernels, tile sizes and formats are chosen for each GPU model, and no mixture has been tried. A warning on CPUs, where
    all variants compute the same up to rounding."""
    for group in need.groups:
        ranks = [each for each in facts if each.rank in group]
        if need.device == "cuda":
            names = [", ".join(sorted({gpu.name for gpu in each.gpus if gpu.total_bytes})) for each in ranks]  # of MIG instances unknown
            for host, odd, here, common in _odd_ones(*_known(ranks, names)):
                yield Finding(
                    severity=Severity.FATAL, check="gpu model", host=host, ranks=odd,
                    found=f"rank(s) {_listed(odd)} have {here}, and the other ranks of their group {common}",
                    todo="mark the hosts of one GPU model with a Ray resource and set resources.host_resource to it, or choose a layout "
                    "whose groups lie within one host, such as pipeline stages",
                )  # fmt: skip
        else:
            for host, odd, here, common in _odd_ones(*_known(ranks, [each.kernel_variant for each in ranks])):
                yield Finding(
                    severity=Severity.WARNING, check="cpu kernels", host=host, ranks=odd,
                    found=f"rank(s) {_listed(odd)} have CPU kernels for {here}, and the other ranks of their group for {common}",
                    todo="this works, but the last bits of results depend on which rank computes what; use hosts with one kind of CPU "
                    "if they must not",
                )  # fmt: skip


def _launcher(facts: Facts, need: Need) -> Iterator[Finding]:
    """Otherwise a rank would fail at its first kernel, after all weights are loaded."""
    for each in _first_of_hosts([each for each in facts if each.triton_launcher_problem and need.device == "cuda"]):
        yield Finding(
            severity=Severity.FATAL, check="compiler", host=each.host, ranks=(each.rank,),
            found=f"Triton cannot compile its kernel launcher: {each.triton_launcher_problem}",
            todo="install a C compiler and Python's headers (Debian: gcc libc6-dev libpython3-dev), or take the image for cuda",
        )  # fmt: skip


def _interface(facts: Facts, need: Need) -> Iterator[Finding]:
    several = len({each.host for each in facts}) > 1
    for each in _first_of_hosts(facts):
        at = each.interface
        if at is None or not at.is_up:
            if several:
                yield Finding(
                    severity=Severity.FATAL, check="network", host=each.host,
                    found="no network interface that is up has this host's address in the cluster",
                    todo="start Ray there with --node-ip-address set to an address that the other hosts reach",
                )  # fmt: skip
        elif several and at.name == "lo":
            yield Finding(
                severity=Severity.FATAL, check="network", host=each.host,
                found=f"the ranks there would use {at.name}, which no other host reaches",
                todo="start Ray there with --node-ip-address set to an address of its network",
            )  # fmt: skip
        elif several and 0 < at.speed_mbit < SLOW_MBIT:
            yield Finding(
                severity=Severity.WARNING, check="network", host=each.host,
                found=f"{at.name} ({at.address}) is a link of {at.speed_mbit} Mbit/s",
                todo="set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to a faster one, or keep tensor parallelism within a host",
            )  # fmt: skip
        else:
            speed = f", {at.speed_mbit} Mbit/s" if at.speed_mbit else ""
            yield Finding(severity=Severity.NOTE, check="network", host=each.host, found=f"ranks meet over {at.name} ({at.address}{speed})")


def _shared_memory(facts: Facts, need: Need) -> Iterator[Finding]:
    """If /dev/shm is full, a rank is killed by SIGBUS without an error message."""
    ranks = Counter(each.host for each in facts)
    for each in _first_of_hosts(facts):
        if ranks[each.host] == 1:
            continue
        wanted = ranks[each.host] * (NCCL_SHM_BYTES if need.device == "cuda" else SEGMENT_BYTES)
        if each.shm_free_bytes < wanted:
            fatal = need.device == "cuda"
            yield Finding(
                severity=Severity.FATAL if fatal else Severity.WARNING, check="shared memory", host=each.host,
                found=f"{SHARED} has {_mib(each.shm_free_bytes)} free of {_mib(each.shm_total_bytes)}, and "
                f"{ranks[each.host]} ranks need {_mib(wanted)}" + ("" if fatal else "; gloo, which is slower, will be used"),
                todo="enlarge it (docker: --shm-size; Kubernetes: an emptyDir of medium Memory at /dev/shm)",
            )  # fmt: skip
        elif need.device == "cpu" and each.kernel_variant is None:
            todo = "run `python -m parallel.native.library` there once"
            if each.compiler is None:
                todo = f"install a C++ compiler (Debian: g++), then {todo}"
            yield Finding(
                severity=Severity.WARNING, check="shared memory", host=each.host,
                found="the CPU kernels are not built; ranks will talk over gloo, which is slower", todo=todo,
            )  # fmt: skip


def _disk(facts: Facts, need: Need) -> Iterator[Finding]:
    for each in _first_of_hosts(facts):
        if each.cache_free_bytes < need.cache_bytes + GIB:
            yield Finding(
                severity=Severity.FATAL if each.cache_free_bytes < need.cache_bytes + 64 * MIB else Severity.WARNING,
                check="disk", host=each.host,
                found=f"{each.cache_folder} has {_gib(each.cache_free_bytes)} free"
                + (f" and needs {_gib(need.cache_bytes)}" if need.cache_bytes else ""),
                todo="make room there, or set MANTA_CACHE to a folder on another disk",
            )  # fmt: skip


def _memory(facts: Facts, need: Need) -> Iterator[Finding]:
    if need.device != "cpu" or not need.weights_bytes:
        return
    ranks = Counter(each.host for each in facts)
    for each in _first_of_hosts(facts):
        wanted = ranks[each.host] * need.weights_bytes
        if each.memory_available_bytes < wanted:
            yield Finding(
                severity=Severity.FATAL, check="memory", host=each.host,
                found=f"{_gib(each.memory_available_bytes)} of memory are free, and the weights of its "
                f"{ranks[each.host]} rank(s) need {_gib(wanted)}",
                todo="end what takes it, raise the container's limit, use more hosts, or a smaller model or dtype",
            )  # fmt: skip


def _clock(facts: Facts, need: Need) -> Iterator[Finding]:
    for each in _first_of_hosts(facts):
        off = each.clock_ahead_at_least_s
        if abs(off) > CLOCK_WARNING_S:
            yield Finding(
                severity=Severity.FATAL if abs(off) > CLOCK_FATAL_S else Severity.WARNING, check="clock", host=each.host,
                found=f"its clock is at least {abs(off):.1f} s {'ahead' if off > 0 else 'behind'}",
                todo="have NTP set it (timedatectl, chronyc tracking)",
            )  # fmt: skip


def _open_files(facts: Facts, need: Need) -> Iterator[Finding]:
    for each in _first_of_hosts(facts):
        if 0 <= each.open_files_limit < OPEN_FILES:
            yield Finding(
                severity=Severity.WARNING, check="open files", host=each.host,
                found=f"a process may open {each.open_files_limit} files and connections",
                todo="raise it before Ray is started (ulimit -n 65536; systemd: LimitNOFILE)",
            )  # fmt: skip


def _checkpoint(facts: Facts, need: Need) -> Iterator[Finding]:
    for each in _first_of_hosts([each for each in facts if each.checkpoint_problem]):
        yield Finding(
            severity=Severity.FATAL, check="checkpoint", host=each.host, ranks=(each.rank,),
            found=f"the checkpoint cannot be opened from there ({each.checkpoint_problem})",
            todo="have it at the same path on every host, or give the URL of a store that all reach",
        )  # fmt: skip


CHECKS: tuple[Check, ...] = (
    _versions, _driver, _gpus, _same_processors, _launcher, _interface, _shared_memory, _disk, _memory, _clock, _open_files, _checkpoint,
)  # fmt: skip


def _must_agree(facts: Facts, name: str, values: Sequence[str | None]) -> Iterator[Finding]:
    """Fatal for ranks whose value differs from the most common one."""
    for host, ranks, here, common in _odd_ones(facts, values):
        yield Finding(
            severity=Severity.FATAL, check="versions", host=host, ranks=ranks,
            found=f"{name} is {here or 'not installed'} there and {common or 'not installed'} on the others",
            todo="install the same release on every host (best by the same image)",
        )  # fmt: skip


def _odd_ones(facts: Facts, values: Sequence[T]) -> Iterator[tuple[str, tuple[int, ...], T, T]]:
    """For each host with ranks whose value is not the most common one: the host, these ranks, the value of the first, the common one."""
    if not values:
        return
    ((common, _),) = Counter(values).most_common(1)
    odd = [(each, value) for each, value in zip(facts, values, strict=True) if value != common]
    for host in dict.fromkeys(each.host for each, _ in odd):
        of_host = [(each, value) for each, value in odd if each.host == host]
        yield host, tuple(each.rank for each, _ in of_host), of_host[0][1], common


def _known(facts: Facts, values: Sequence[str | None]) -> tuple[list[HostFacts], list[str]]:
    """The ranks that have a value, and the values."""
    known = [(each, value) for each, value in zip(facts, values, strict=True) if value]
    return [each for each, _ in known], [value for _, value in known]


def _first_of_hosts(facts: Facts) -> list[HostFacts]:
    return list({each.host: each for each in reversed(facts)}.values())[::-1]


def _fewest_gpus_by_host(facts: Facts, need: Need) -> list[HostFacts]:
    return _first_of_hosts([each for each in facts if len(each.gpus) < max(need.gpus_per_rank, 0.001)])


def _once_per_gpu(facts: Facts) -> Iterator[tuple[HostFacts, GpuFacts]]:
    seen = set()
    for each in facts:
        for gpu in each.gpus:
            if (each.host, gpu.index) not in seen:
                seen.add((each.host, gpu.index))
                yield each, gpu


def _minor(python: str) -> str:
    """Patch releases of Python are compatible in everything that ranks exchange."""
    return ".".join(python.split(".")[:2])


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB"
