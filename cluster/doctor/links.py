"""Measures the links between the ranks of a group: an all-reduce, and each link of the ring by itself. Runs in the ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.doctor.findings import Finding, Severity
from parallel.collectives import all_gather, all_reduce, barrier, receive, send
from parallel.groups import Group

SMALL_BYTES = 16 * 2**10
"""About the size of an all-reduce in a decode step, which is dominated by latency."""
LARGE_BYTES = 16 * 2**20
"""About the size of an all-reduce in a prefill step, which is dominated by bandwidth."""
REPEATS_SMALL, REPEATS_LARGE = 20, 3
SLOW_LINK = 4.0
"""A link that is this many times slower than the median link is reported."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """The measurements; the same on every rank."""

    transport: str
    latency_s: float
    """Time of an all-reduce of `SMALL_BYTES` on the slowest rank."""
    bandwidth_bytes_per_s: float
    """Bytes that each rank sends in an all-reduce of `LARGE_BYTES` (2 (n - 1) / n of the message in a ring), divided by its time."""
    link_bandwidths: tuple[float, ...]
    """From each rank to the next one, and from the last to the first, in bytes/s, while all other links are idle."""


def measure_links(group: Group, device: torch.device) -> Links:
    """All ranks of ``group`` must call this at the same time.

    Raises:
        ArithmeticError: an all-reduce gave a wrong sum.
    """
    small = torch.ones(SMALL_BYTES // 4, device=device)
    large = torch.ones(LARGE_BYTES // 4, device=device)
    for x in (small, large):  # the first use opens connections and allocates buffers
        if not torch.equal(all_reduce(x.clone(), group), torch.full_like(x, float(group.size))):
            raise ArithmeticError(f"an all-reduce of {x.nbytes} bytes over {group!r} gave a wrong sum")
    latency_s = _slowest(_timed(lambda: all_reduce(small.clone(), group), REPEATS_SMALL, group, device), group, device)
    whole_s = _slowest(_timed(lambda: all_reduce(large.clone(), group), REPEATS_LARGE, group, device), group, device)
    sent = 2 * (group.size - 1) / group.size * LARGE_BYTES
    return Links(
        transport=str(group.transport or "nothing"),
        latency_s=latency_s,
        bandwidth_bytes_per_s=sent / whole_s,
        link_bandwidths=tuple(_link(large, rank, group, device) for rank in range(group.size)) if group.size > 1 else (),
    )


def link_findings(links: Links, hosts: tuple[str, ...]) -> list[Finding]:
    """``hosts``: the host of each rank."""
    if not links.link_bandwidths:
        return []
    median = sorted(links.link_bandwidths)[len(links.link_bandwidths) // 2]
    findings = [
        Finding(
            severity=Severity.NOTE,
            check="all-reduce",
            host=None,
            found=f"{len(hosts)} ranks by {links.transport}: {links.latency_s * 1e6:.0f} us for {SMALL_BYTES >> 10} KiB, "
            f"{links.bandwidth_bytes_per_s / 1e9:.2f} GB/s for {LARGE_BYTES >> 20} MiB",
        )
    ]
    for rank, bandwidth in enumerate(links.link_bandwidths):
        after = (rank + 1) % len(hosts)
        if bandwidth * SLOW_LINK < median and (
            hosts[rank] != hosts[after] or "nccl" in links.transport
        ):  # between processes of a host it is noise
            findings.append(
                Finding(
                    severity=Severity.WARNING,
                    check="link",
                    host=hosts[rank],
                    ranks=(rank, after),
                    found=f"from rank {rank} to rank {after} ({hosts[after]}) {bandwidth / 1e9:.2f} GB/s pass, "
                    f"and {median / 1e9:.2f} GB/s over the median link",
                    todo="look at the cable, the switch port and the interface (ethtool, nvidia-smi topo -m)",
                )
            )
    return findings


def _timed(act: Callable[[], object], repeats: int, group: Group, device: torch.device) -> float:
    """Seconds of one call: the mean of ``repeats`` calls in a row."""
    barrier(group)
    started = time.monotonic()
    for _ in range(repeats):
        act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.monotonic() - started, 1e-9) / repeats


def _link(x: torch.Tensor, source: int, group: Group, device: torch.device) -> float:
    """Bytes/s from ``source`` to the next rank, which answers with one element once it has received all."""
    target = (source + 1) % group.size

    def there_and_back() -> None:
        if group.rank == source:
            send(x, target, group)
            receive((1,), target, group, dtype=x.dtype, device=device)
        elif group.rank == target:
            receive(x.shape, source, group, dtype=x.dtype, device=device)
            send(x[:1], source, group)

    there_and_back()
    return x.nbytes / min(_slowest(_timed(there_and_back, 1, group, device), group, device) for _ in range(REPEATS_LARGE))


def _slowest(seconds: float, group: Group, device: torch.device) -> float:
    return float(all_gather(torch.tensor([seconds], dtype=torch.float64, device=device), group, dim=0).max())
