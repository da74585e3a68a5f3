"""What a process leaves that crashes, and one that is killed does not."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import crash_report

ROOT = Path(__file__).parents[2]


def end(note: Path, how: str) -> None:
    code = f"import os, signal\nfrom pathlib import Path\nfrom cluster import crash_report\ncrash_report.enable(Path({str(note)!r}))\n{how}"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode < 0


@pytest.mark.parametrize(("how", "told"), [("os.abort()", "Aborted"), ("os.kill(os.getpid(), signal.SIGSEGV)", "Segmentation fault")])
def test_a_crash_is_told_with_where_it_was(tmp_path: Path, how: str, told: str) -> None:
    end(tmp_path / "note", how)
    note = crash_report.read(tmp_path / "note")
    assert note is not None
    assert told in note.splitlines()[0]
    assert "<module>" in note


def test_who_is_killed_leaves_no_word(tmp_path: Path) -> None:
    end(tmp_path / "note", "os.kill(os.getpid(), signal.SIGKILL)")
    assert crash_report.read(tmp_path / "note") is None
    assert crash_report.read(tmp_path / "nowhere") is None
