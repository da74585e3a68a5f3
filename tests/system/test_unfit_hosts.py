"""A host that cannot hold its ranks: `manta serve` ends with what the doctor found there, before anything is loaded."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hollow_model import write_too_large
from tests.system.server import free_ports

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(600)]

START_S = 500.0


def test_a_model_larger_than_the_memory_ends_the_start_and_names_the_host(tmp_path: Path) -> None:
    http, grpc = free_ports(2)
    model = write_too_large(tmp_path / "hollow")
    command = [sys.executable, "-m", "serve", "serve", str(model), "-t", "2", "-r", "2", "--dtype", "bfloat16"]
    ports = ["--http-port", str(http), "--grpc-port", str(grpc)]
    done = subprocess.run([*command, *ports], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("manta: ")]
    host = re.escape(socket.gethostname())
    found = rf"manta: {host}: [\d.]+ GiB of memory are free, and the weights of its 2 rank\(s\) need [\d.]+ GiB; end what takes it, "
    assert said, done.stderr
    assert all(re.match(found, line) for line in said), said
    assert "Traceback" not in done.stdout + done.stderr
