"""Failpoints do nothing when off; armed they fire once, in one process, at the chosen hit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine import failpoints
from engine.failpoints import POINTS, Failure, Injected, arm, disarm, has_fired

ROOT = Path(__file__).parents[2]
PASSING = """
import sys
from engine.failpoints import hit
for at in range(int(sys.argv[1])):
    print(at, hit("link.send"), flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(failpoints, "FOLDER", str(tmp_path))
    return tmp_path


def test_without_a_folder_points_do_nothing() -> None:
    assert failpoints.hit is failpoints._off
    assert not failpoints.hit("rank.step")


def test_an_armed_point_fires_at_its_hit_and_only_once(folder: Path) -> None:
    arm(folder, "rank.step", Failure(action="error", after=3))
    for _ in range(2):
        assert not failpoints._look("rank.step")
    with pytest.raises(Injected, match=r"rank\.step"):
        failpoints._look("rank.step")
    assert not failpoints._look("rank.step")
    assert not disarm(folder, "rank.step"), "it has fired"


def test_armed_again_it_counts_anew(folder: Path) -> None:
    for _ in range(2):
        arm(folder, "link.send", Failure(action="drop", after=2))
        assert [failpoints._look("link.send") for _ in range(3)] == [False, True, False]


def test_a_point_armed_for_a_token_fires_on_every_hit_until_disarmed(folder: Path) -> None:
    arm(folder, "rank.step", Failure(action="memory", token=7))
    assert not failpoints._look("rank.step", lambda: (1, 2))
    for _ in range(2):
        with pytest.raises(MemoryError):
            failpoints._look("rank.step", lambda: (1, 7))
    assert disarm(folder, "rank.step")
    assert not failpoints._look("rank.step", lambda: (1, 7))


def test_has_fired_also_works_for_points_that_stay_armed(folder: Path) -> None:
    for once_or_always in (Failure(action="drop"), Failure(action="drop", pid=os.getpid())):
        arm(folder, "link.send", once_or_always)
        assert not has_fired(folder, "link.send")
        assert failpoints._look("link.send")
        assert has_fired(folder, "link.send")


def test_a_point_armed_for_a_process_fires_only_there_and_every_time(folder: Path) -> None:
    arm(folder, "intake.send", Failure(action="drop", pid=os.getpid()))
    assert [failpoints._look("intake.send") for _ in range(3)] == [True] * 3
    arm(folder, "intake.send", Failure(action="drop", pid=1))
    assert not failpoints._look("intake.send")


def test_an_unknown_point_cannot_be_armed(folder: Path) -> None:
    with pytest.raises(ValueError, match="no failpoint"):
        arm(folder, "rank.stpe", Failure(action="crash"))


def test_a_point_fires_in_only_one_of_several_processes(tmp_path: Path) -> None:
    arm(tmp_path, "link.send", Failure(action="crash", after=2))
    environment = {"MANTA_FAILPOINTS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    codes = [subprocess.run([sys.executable, "-c", PASSING, "3"], env=environment, capture_output=True).returncode for _ in range(2)]
    assert codes == [-9, 0]


def test_the_list_of_points_matches_the_code() -> None:
    found = set()
    for package in ("engine", "cluster", "serve"):
        for file in (ROOT / package).rglob("*.py"):
            found |= set(re.findall(r'\bhit\(\s*"([a-z.]+)"', file.read_text()))
    assert found == set(POINTS)
