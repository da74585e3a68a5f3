"""Facts of this very process, links between real ranks, and a survey of this machine."""

import socket
import sys
from pathlib import Path

import pytest
import torch

from cluster.doctor.facts import Need
from cluster.doctor.gather import gather, parse_gpus, triton_launcher_problem
from cluster.doctor.links import Links, link_findings, measure_links
from cluster.doctor.survey import survey_this_machine
from parallel.groups import ParallelGroups
from parallel.topology import Topology
from tests.ranks import run_ranks

LISTING = """0, GPU-aaaa, NVIDIA H100, 81559, 4, 580.10
1, GPU-bbbb, NVIDIA H100, 81559, 70000, 580.10
"""


def test_facts_of_this_process(tmp_path: Path) -> None:
    facts = gather(rank=3, address="127.0.0.1", cache_folder=tmp_path / "not" / "made" / "yet")
    assert (facts.host, facts.rank) == (socket.gethostname(), 3)
    assert facts.python == sys.version.split()[0]
    assert facts.versions["torch"] == torch.__version__
    assert facts.interface is not None
    assert facts.interface.address == "127.0.0.1"
    assert facts.cache_free_bytes > 0
    assert facts.memory_available_bytes > 2**20
    assert facts.checkpoint_problem is None
    assert not (tmp_path / "not").exists()


def test_what_cannot_be_opened_is_a_fact(tmp_path: Path) -> None:
    def look() -> None:
        (tmp_path / "config.json").read_text()

    missing = gather(rank=0, address=None, cache_folder=tmp_path, open_checkpoint=look).checkpoint_problem
    assert missing is not None
    assert "config.json" in missing


@pytest.mark.parametrize(("visible", "seen"), [(None, [0, 1]), ("1", [1]), ("GPU-aaaa", [0]), ("", []), ("0,1", [0, 1])])
def test_the_gpus_of_a_process_are_those_it_may_see(visible: str | None, seen: list[int]) -> None:
    driver, gpus = parse_gpus(LISTING, visible)
    assert driver == "580.10"
    assert [gpu.index for gpu in gpus] == seen


@pytest.mark.parametrize("visible", ["MIG-4e1d-77", "MIG-4e1d-77,MIG-4e1d-78"])
def test_parts_of_a_gpu_are_seen_though_nvidia_smi_does_not_list_them(visible: str) -> None:
    _, gpus = parse_gpus(LISTING, visible)
    assert [gpu.name for gpu in gpus] == visible.split(",")
    assert {gpu.total_bytes for gpu in gpus} == {0}


def test_a_gpu_that_is_in_parts_is_seen_without_its_memory() -> None:
    _, (gpu,) = parse_gpus("0, GPU-aaaa, NVIDIA H100, [N/A], [N/A], 580.10", None)
    assert (gpu.index, gpu.total_bytes, gpu.used_bytes) == (0, 0, 0)


def test_triton_needs_a_compiler_and_headers_until_it_has_built_its_launcher(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    kept, empty = tmp_path / "cache", tmp_path / "nothing"
    environment = {"TRITON_CACHE_DIR": str(kept), "PATH": str(empty)}
    (tmp_path / "Python.h").touch()
    assert triton_launcher_problem(environment, tmp_path) == "there is no C compiler"
    assert triton_launcher_problem(environment | {"CC": "tcc"}, tmp_path) is None
    assert "Python.h" in (triton_launcher_problem(environment | {"CC": "tcc"}, empty) or "")
    (kept / "AB12").mkdir(parents=True)
    (kept / "AB12" / "cuda_utils.cpython-311-x86_64-linux-gnu.so").touch()
    assert triton_launcher_problem(environment, empty) is None


def measured(groups: ParallelGroups) -> Links:
    return measure_links(groups.world, torch.device("cpu"))


def test_links_are_measured_alike_on_all_ranks() -> None:
    links = run_ranks(Topology(tp=3), measured)
    assert links[0] == links[1] == links[2]
    assert len(links[0].link_bandwidths) == 3
    assert min(links[0].latency_s, links[0].bandwidth_bytes_per_s, *links[0].link_bandwidths) > 0


def test_a_slow_link_between_hosts_names_both() -> None:
    links = Links(transport="gloo", latency_s=1e-4, bandwidth_bytes_per_s=1e9, link_bandwidths=(1e10, 1e9, 1e10, 9e9))
    told = link_findings(links, ("a", "a", "b", "b"))
    (slow,) = (finding for finding in told if finding.check == "link")
    assert (slow.host, slow.ranks) == ("a", (1, 2))
    assert "rank 2 (b) 1.00 GB/s" in slow.found
    assert link_findings(links, ("a",) * 4)[1:] == []


def test_this_machine_is_surveyed_rank_by_rank(tmp_path: Path) -> None:
    survey = survey_this_machine(Topology(tp=2), Need(), cache_folder=tmp_path, host_check=None)
    assert [each.rank for each in survey.facts] == [0, 1]
    assert [finding.check for finding in survey.findings].count("all-reduce") == 1
