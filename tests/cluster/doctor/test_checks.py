"""Findings from made-up facts of many hosts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster.doctor.checks import examine
from cluster.doctor.facts import GpuFacts, HostFacts, InterfaceFacts, Need, clock_ahead
from cluster.doctor.findings import Finding, Severity, is_fatal

GIB = 2**30
VERSIONS = {"manta": "0.1.0", "torch": "2.13.0+cu130", "ray": "2.60.0", "nccl": "2.28.3"}
H100 = GpuFacts(index=0, name="H100", total_bytes=80 * GIB, used_bytes=GIB // 2)
CUDA = Need(device="cuda", gpus_per_rank=1, weights_bytes=20 * GIB)
CPU = Need(weights_bytes=2 * GIB)


def facts(rank: int, host: str, **other: Any) -> HostFacts:
    """A rank on a host where all is well."""
    well: dict[str, Any] = {
        "host": host,
        "rank": rank,
        "python": "3.11.7",
        "versions": VERSIONS,
        "driver": "580.10",
        "gpus": (dataclasses.replace(H100, index=rank),),
        "interface": InterfaceFacts(name="eth0", address=f"10.0.0.{rank + 1}", is_up=True, speed_mbit=100_000),
        "cores": 16,
        "memory_available_bytes": 100 * GIB,
        "shm_total_bytes": 16 * GIB,
        "shm_free_bytes": 15 * GIB,
        "cache_folder": "/cache",
        "cache_free_bytes": 500 * GIB,
        "open_files_limit": 65_536,
        "compiler": "/usr/bin/c++",
        "kernel_variant": "avx512_vnni",
    }
    return HostFacts(**(well | other))


def sixteen(**of_one: Any) -> list[HostFacts]:
    """Ranks on two hosts; one rank on host-b is otherwise."""
    return [facts(rank, "host-a" if rank < 8 else "host-b", **(of_one if rank == 11 else {})) for rank in range(16)]


def grave(found: list[Finding]) -> list[tuple[Severity, str, str | None]]:
    return [(finding.severity, finding.check, finding.host) for finding in found if finding.severity is not Severity.NOTE]


@pytest.mark.parametrize("need", [CUDA, CPU], ids=["cuda", "cpu"])
def test_of_hosts_where_all_is_well_only_the_network_is_told(need: Need) -> None:
    found = examine(sixteen(), need)
    assert grave(found) == []
    assert {finding.host for finding in found} == {"host-a", "host-b"}
    assert not is_fatal(found)


@pytest.mark.parametrize(
    ("changed", "need", "severity", "check", "words"),
    [
        ({"versions": {**VERSIONS, "torch": "2.12.1+cu130"}}, CUDA, "fatal", "versions", "torch is 2.12.1+cu130 there and 2.13.0+cu130"),
        ({"versions": {**VERSIONS, "torch": "2.13.0+cu128"}}, CUDA, "fatal", "versions", "torch is 2.13.0+cu128"),
        ({"versions": {**VERSIONS, "ray": "2.59.0"}}, CPU, "fatal", "versions", "ray is 2.59.0"),
        ({"versions": {k: v for k, v in VERSIONS.items() if k != "nccl"}}, CUDA, "fatal", "versions", "nccl is not installed there"),
        ({"python": "3.12.1"}, CPU, "fatal", "versions", "Python is 3.12 there and 3.11"),
        ({"driver": "570.1"}, CUDA, "warning", "driver", "570.1"),
        ({"gpus": ()}, CUDA, "fatal", "gpu", "is to have 1 GPU and sees 0"),
        ({"triton_launcher_problem": "there is no C compiler"}, CUDA, "fatal", "compiler", "there is no C compiler"),
        ({"gpus": (dataclasses.replace(H100, index=11, used_bytes=30 * GIB),)}, CUDA, "warning", "gpu", "30.0 GiB of 80.0 GiB taken"),
        ({"gpus": (dataclasses.replace(H100, index=11, total_bytes=16 * GIB),)}, CUDA, "fatal", "memory", "weights need 20.0 GiB"),
        ({"clock_ahead_at_least_s": 3.0}, CPU, "warning", "clock", "at least 3.0 s ahead"),
        ({"clock_ahead_at_least_s": -3600.0}, CPU, "fatal", "clock", "3600.0 s behind"),
        ({"checkpoint_problem": "FileNotFoundError: x"}, CPU, "fatal", "checkpoint", "FileNotFoundError: x"),
    ],
)
def test_one_rank_that_is_otherwise_names_its_host(changed: dict[str, Any], need: Need, severity: str, check: str, words: str) -> None:
    found = examine([each if each.rank != 8 else facts(8, "host-b", **changed) for each in sixteen(**changed)], need)
    graves = [finding for finding in found if finding.severity is not Severity.NOTE]
    assert {(finding.severity.value, finding.check, finding.host) for finding in graves} >= {(severity, check, "host-b")}
    assert all(finding.host == "host-b" for finding in graves)
    assert any(words in finding.found for finding in graves)
    assert all(finding.todo for finding in graves)
    assert is_fatal(found) == (severity == "fatal")


@pytest.mark.parametrize(
    ("changed", "need", "severity", "check", "words"),
    [
        ({"interface": None}, CUDA, "fatal", "network", "no network interface"),
        ({"interface": InterfaceFacts(name="lo", address="127.0.0.1", is_up=True, speed_mbit=0)}, CUDA, "fatal", "network", "would use lo"),
        (
            {"interface": InterfaceFacts(name="eth1", address="10.1.0.1", is_up=True, speed_mbit=1000)},
            CPU,
            "warning",
            "network",
            "1000 Mbit/s",
        ),
        ({"shm_free_bytes": 64 << 20, "shm_total_bytes": 64 << 20}, CUDA, "fatal", "shared memory", "64 MiB free of 64 MiB"),
        ({"shm_free_bytes": 64 << 20, "shm_total_bytes": 64 << 20}, CPU, "warning", "shared memory", "gloo"),
        ({"kernel_variant": None}, CPU, "warning", "shared memory", "not built"),
        ({"cache_free_bytes": 1 << 20}, CPU, "fatal", "disk", "/cache has 0.0 GiB free"),
        ({"cache_free_bytes": GIB // 2}, CPU, "warning", "disk", "/cache has 0.5 GiB free"),
        ({"memory_available_bytes": 9 * GIB}, CPU, "fatal", "memory", "8 rank(s) need 16.0 GiB"),
        ({"open_files_limit": 1024}, CPU, "warning", "open files", "1024 files"),
    ],
)
def test_what_is_wrong_with_a_host_is_said_once(changed: dict[str, Any], need: Need, severity: str, check: str, words: str) -> None:
    ranks = [facts(rank, "host-a") for rank in range(8)] + [facts(rank, "host-b", **changed) for rank in range(8, 16)]
    (finding,) = (finding for finding in examine(ranks, need) if finding.severity is not Severity.NOTE)
    assert (finding.severity.value, finding.check, finding.host) == (severity, check, "host-b")
    assert words in finding.found
    assert finding.todo


A100 = dataclasses.replace(H100, name="A100")
ONE_GROUP, TWO_GROUPS = (tuple(range(16)),), (tuple(range(8)), tuple(range(8, 16)))
ON_B = [facts(rank, "host-b", gpus=(dataclasses.replace(A100, index=rank),), kernel_variant="amx") for rank in range(8, 16)]


@pytest.mark.parametrize(
    ("need", "severity", "check", "words"),
    [
        (CUDA, Severity.FATAL, "gpu model", "rank(s) 8, 9, 10, 11, 12, 13, 14, 15 have A100, and the other ranks of their group H100"),
        (CPU, Severity.WARNING, "cpu kernels", "have CPU kernels for amx, and the other ranks of their group for avx512_vnni"),
    ],
    ids=["cuda", "cpu"],
)
def test_ranks_that_compute_together_have_processors_of_one_kind(need: Need, severity: Severity, check: str, words: str) -> None:
    ranks = [facts(rank, "host-a") for rank in range(8)] + ON_B
    (finding,) = (each for each in examine(ranks, dataclasses.replace(need, groups=ONE_GROUP)) if each.severity is not Severity.NOTE)
    assert (finding.severity, finding.check, finding.host) == (severity, check, "host-b")
    assert words in finding.found
    assert finding.todo
    assert grave(examine(ranks, dataclasses.replace(need, groups=TWO_GROUPS))) == [], "such as two pipeline stages"
    assert grave(examine(ranks, need)) == []


def test_a_rank_whose_processor_is_unknown_is_not_compared() -> None:
    part = GpuFacts(index=0, name="MIG-4e1d", total_bytes=0, used_bytes=0)
    other = dataclasses.replace(part, name="MIG-77aa")
    pair = [facts(0, "a", gpus=(part,), kernel_variant=None), facts(1, "b", gpus=(other,))]
    assert grave(examine(pair, dataclasses.replace(CUDA, groups=((0, 1),)))) == []
    assert grave(examine(pair, Need(groups=((0, 1),)))) == []


def test_without_a_compiler_it_is_said_what_to_install() -> None:
    ranks = [facts(rank, "host-a", kernel_variant=None, compiler=None) for rank in range(2)]
    assert "install a C++ compiler" in examine(ranks, CPU)[0].todo


def test_of_a_gpu_whose_memory_nobody_tells_nothing_is_held_against_it() -> None:
    part = GpuFacts(index=0, name="MIG-4e1d", total_bytes=0, used_bytes=0)
    assert grave(examine([facts(0, "host-a", gpus=(part,))], CUDA)) == []


def test_the_image_for_gpus_brings_what_is_asked_for_where_no_compiler_is() -> None:
    (finding,) = (
        one for one in examine([facts(0, "a", triton_launcher_problem="there is no C compiler")], CUDA) if one.check == "compiler"
    )
    packages = finding.todo.partition("Debian: ")[2].partition(")")[0].split()
    stage = (Path(__file__).parents[3] / "k8s" / "images" / "Dockerfile").read_text().partition("FROM manta AS cuda\n")[2]
    assert len(packages) == 3
    assert all(package in stage.split() for package in packages)


def test_cpus_need_nothing_to_launch_kernels_by() -> None:
    assert grave(examine([facts(0, "host-a", triton_launcher_problem="there is no C compiler")], CPU)) == []


def test_one_host_may_meet_over_loopback() -> None:
    loopback = InterfaceFacts(name="lo", address="127.0.0.1", is_up=True, speed_mbit=0)
    assert grave(examine([facts(rank, "host-a", interface=loopback) for rank in range(2)], CPU)) == []


def test_patch_releases_of_python_are_alike() -> None:
    assert grave(examine([facts(0, "a"), facts(1, "b", python="3.11.9")], CPU)) == []


def test_the_gravest_come_first() -> None:
    ranks = [facts(0, "host-a", open_files_limit=100), facts(1, "host-b", checkpoint_problem="gone")]
    assert [finding.severity.value for finding in examine(ranks, CPU)] == ["fatal", "warning", "note", "note"]


@pytest.mark.parametrize(
    ("began", "ended", "ahead"),
    [(10.1, 10.2, 0.0), (13.1, 13.2, 2.2), (7.0, 7.1, -3.0), (10.9, 11.0, 0.0)],
)
def test_a_clock_is_blamed_for_no_more_than_is_certain(began: float, ended: float, ahead: float) -> None:
    assert clock_ahead(asked_s=10.0, began_s=began, ended_s=ended, answered_s=11.0) == pytest.approx(ahead)
