"""Examines ranks and runs the checks on all of them. On this machine alone each rank is a process; on Ray see `cluster_survey`."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.doctor.checks import examine
from cluster.doctor.facts import HostFacts, Need, clock_ahead
from cluster.doctor.findings import Finding, Severity, ordered
from cluster.doctor.gather import gather
from parallel.topology import Topology

LOOPBACK = "127.0.0.1"
LINKS_TIMEOUT_S = 120.0

HostCheck = Callable[[], None]
"""Raises if the host where it is called lacks something that a rank needs."""


@dataclass(frozen=True, kw_only=True)
class Examined:
    """Facts of one rank, and when gathering them began and ended, in Unix time by its host's clock."""

    facts: HostFacts
    began_s: float
    ended_s: float


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The facts of all ranks and the findings."""

    facts: tuple[HostFacts, ...]
    findings: tuple[Finding, ...]

    def with_findings(self, more: Sequence[Finding]) -> "Survey":
        """A copy with additional findings."""
        return replace(self, findings=tuple(ordered((*self.findings, *more))))


def examine_rank(rank: int, address: str | None, cache_folder: Path, host_check: HostCheck | None) -> Examined:
    began_s = time.time()
    facts = gather(rank=rank, address=address, cache_folder=cache_folder, open_checkpoint=host_check)
    return Examined(facts=facts, began_s=began_s, ended_s=time.time())


def judge(examined: Sequence[Examined], need: Need, *, asked_s: float, answered_s: float) -> Survey:
    """Run the checks on all ranks. ``asked_s`` and ``answered_s``: Unix time by the caller's clock."""
    facts = tuple(
        replace(
            each.facts,
            clock_ahead_at_least_s=clock_ahead(asked_s=asked_s, began_s=each.began_s, ended_s=each.ended_s, answered_s=answered_s),
        )
        for each in examined
    )
    return Survey(facts=facts, findings=tuple(examine(facts, need)))


def survey_this_machine(topology: Topology, need: Need, *, cache_folder: Path, host_check: HostCheck | None) -> Survey:
    """Examine every rank in a process of its own; several ranks also measure the links between them."""
    context = multiprocessing.get_context("spawn")
    asked_s = time.time()
    with ProcessPoolExecutor(topology.size, mp_context=context) as processes:
        gathered = [processes.submit(examine_rank, rank, LOOPBACK, cache_folder, host_check) for rank in range(topology.size)]
        survey = judge([future.result() for future in gathered], need, asked_s=asked_s, answered_s=time.time())
    if topology.size == 1:
        return survey
    from parallel.groups import free_rendezvous

    meeting = free_rendezvous()
    with ProcessPoolExecutor(topology.size, mp_context=context) as processes:
        hosts = tuple(each.host for each in survey.facts)
        measuring = [
            processes.submit(measure, topology, rank, meeting.host, meeting.port, need.device, hosts) for rank in range(topology.size)
        ]
        return with_links(survey, measuring)


def measure(topology: Topology, rank: int, host: str, port: int, device: str, hosts: tuple[str, ...]) -> list[Finding]:
    """Measure the links between all ranks. Must be called on all ranks at the same time; returns the findings on each."""
    import torch

    from cluster.doctor.links import link_findings, measure_links
    from parallel.groups import Rendezvous, open_groups

    torch.set_num_threads(1)
    here = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    with open_groups(topology, rank, rendezvous=Rendezvous(host, port), device=here, timeout_s=LINKS_TIMEOUT_S) as groups:
        return link_findings(measure_links(groups.world, here), hosts)


def with_links(survey: Survey, measuring: Sequence[Future[list[Finding]]]) -> Survey:
    """Add rank 0's measurements, and a finding for each rank that could not take part."""
    findings: list[Finding] = []
    for each, future in zip(survey.facts, measuring, strict=True):
        try:
            measured = future.result()
        except Exception as error:  # any error of the rank
            measured = []
            findings.append(communication_failure(each.host, each.rank, error))
        if each.rank == 0:
            findings.extend(measured)
    return survey.with_findings(findings)


def communication_failure(host: str, rank: int, error: Exception) -> Finding:
    return Finding(
        severity=Severity.FATAL,
        check="all-reduce",
        host=host,
        ranks=(rank,),
        found=f"rank {rank} cannot take part in an all-reduce ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})",
        todo="see the findings above; else run again with NCCL_DEBUG=INFO or TORCH_CPP_LOG_LEVEL=INFO",
    )
