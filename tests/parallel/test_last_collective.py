"""A rank's last collective can be read when the rank itself cannot answer any more."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from parallel.collectives import all_gather, all_reduce, barrier
from parallel.groups import ParallelGroups
from parallel.last_collective import KINDS, LastCollective, read, record, record_replay, record_to
from parallel.topology import Topology
from tests.ranks import end_pools, run_ranks

NOTING = """
import sys, time
from pathlib import Path
from parallel.last_collective import record_to, record
record_to(Path(sys.argv[1]))
record("all_reduce", "tp", 7)
record("broadcast", "world", 12)
print("noted", flush=True)
time.sleep(600)
"""


def some_collectives(groups: ParallelGroups, folder: Path) -> None:
    record_to(folder / str(groups.rank))
    all_reduce(torch.ones(3), groups.tp)
    all_gather(torch.ones(2, 5), groups.tp, dim=0)
    barrier(groups.world)
    all_reduce(torch.ones(4), groups.tp)


def test_each_ranks_page_holds_its_last_collective(tmp_path: Path) -> None:
    run_ranks(Topology(tp=2), some_collectives, tmp_path)
    end_pools()  # their processes would go on writing there
    for rank in range(2):
        last = read(tmp_path / str(rank))
        assert isinstance(last, LastCollective)
        assert (last.number, last.kind, last.axis, last.elements) == (4, "all_reduce", "tp", 4)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_the_page_can_be_read_when_the_process_is_dead_or_stopped(tmp_path: Path, end: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", NOTING, str(tmp_path / "page")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"noted\n"
        process.send_signal(end)
        last = read(tmp_path / "page")
        process.kill()
    assert isinstance(last, LastCollective)
    assert (last.number, last.kind, last.axis, last.elements) == (2, "broadcast", "world", 12)
    assert "broadcast number 2 over world, 12 elements, begun 0." in str(last) or last.ago_s >= 1


def test_a_replayed_step_is_reported_until_the_next_launched_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.last_collective._page", None)  # put back behind this test
    page = tmp_path / "page"
    record_to(page)
    record_replay(7)
    assert str(read(page)).startswith("replaying step 7, begun ")
    record("all_reduce", "tp", 12)
    assert str(read(page)).startswith("all_reduce number 1 over tp, 12 elements, begun ")
    record_replay(8)
    assert str(read(page)).startswith("replaying step 8, begun ")
    assert "(launched before it: all_reduce number 1 over tp, 12 elements" in str(read(page))


def test_without_a_page_or_a_collective_nothing_is_read(tmp_path: Path) -> None:
    assert read(tmp_path / "none") is None
    (tmp_path / "empty").write_bytes(bytes(64))
    assert read(tmp_path / "empty") is None
    assert len(KINDS) == len(set(KINDS))
