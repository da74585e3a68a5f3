"""Pods whose tests are killed leave nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.k8s.pods import ROOT, can_start_pods
from tests.system.server import eventually

NODE = """
import os, subprocess, sys, time
from pathlib import Path
from tests.k8s.pods import MARK, Node
folder = Path(sys.argv[1])
with Node(folder, "", folder).up() as node:
    node._join("a", 2, "10.213.77.2")
    node._make(folder / "made" / "deep")
    command = ["ip", "netns", "exec", node._namespace("a"), "sleep", "1000"]
    pod = subprocess.Popen(command, env={**os.environ, MARK: node._mark}, start_new_session=True)
    print(node._bridge, pod.pid, flush=True)
    sys.stdin.read()
    pod.kill()
"""


def listed(*what: str) -> str:
    return subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("is_killed", [True, False])
def test_nothing_is_left_of_a_node(tmp_path: Path, is_killed: bool) -> None:
    if not can_start_pods():
        pytest.skip("pods are network namespaces, which need root, ip and unshare")
    with subprocess.Popen(
        [sys.executable, "-c", NODE, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as tests:
        assert tests.stdout is not None
        if not (said := tests.stdout.readline()):
            pytest.skip("this machine has no network namespaces")
        bridge, pid = said.split()[0], int(said.split()[1])
        assert bridge in listed("netns", "list")
        if is_killed:
            os.kill(tests.pid, signal.SIGKILL)
    eventually(lambda: not psutil.pid_exists(pid), 30)
    eventually(lambda: bridge not in listed("netns", "list") + listed("link", "show"), 30)
    eventually(lambda: not (tmp_path / "made").exists(), 30)
