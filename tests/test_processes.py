import subprocess
import sys

import psutil
import pytest

from tests.processes import command_of, kill, name_of, named


def test_a_process_that_has_ended_since_it_was_listed_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        listed = psutil.Process(process.pid)
        name, others = listed.name(), [psutil.Process()]
        assert name_of(listed) == name
        assert command_of(listed)[1:] == ["-c", "input()"]
        assert named([listed], "no such", name) == [listed]
        assert named([listed], "no such") == []
    finally:
        process.communicate(b"\n")
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(process.pid)
    listed._name = None  # psutil remembers names; a process that was never asked has none to remember
    assert (name_of(listed), command_of(listed), named([listed], name)) == ("", [], [])
    assert named([listed, *others], psutil.Process().name()) == others
    assert kill([listed]) == frozenset()


def test_those_that_were_killed_are_told() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert kill([psutil.Process(process.pid)]) == {process.pid}
    assert process.returncode == -9
