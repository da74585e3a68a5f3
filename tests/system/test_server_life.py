"""`manta serve` as a person runs it: it answers on loopback only, outlives the death of a rank, and ends without a trace."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    def __init__(self, folder: Path, log: Path) -> None:
        self.http, self.grpc, self.log = free_port(), free_port(), log
        command = [sys.executable, "-m", "serve", "serve", str(folder), "--name", "demo", "--tensor-parallel", "2"]
        command += ["--http-port", str(self.http), "--grpc-port", str(self.grpc)]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)

    def status(self) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/readyz", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def family(self) -> set[psutil.Process]:
        return set(psutil.Process(self.process.pid).children(recursive=True))

    def until(self, condition: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture
def server(demo_folder: Path, tmp_path: Path) -> Iterator[Server]:
    made = Server(demo_folder, tmp_path / "log")
    try:
        made.until(lambda: "Ctrl-C ends it" in made.log.read_text(), within_s=300)
        yield made
    finally:
        if made.process.poll() is None:
            made.process.terminate()
            made.process.wait(30)


def test_a_server_outlives_the_death_of_a_rank_and_ends_without_a_trace(server: Server) -> None:
    assert server.status() == 200
    family = server.family()
    listening = {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in (server.http, server.grpc)
    }
    assert listening == {("127.0.0.1", server.http), ("127.0.0.1", server.grpc)}

    victim = next(process for process in family if "Worker.serve" in " ".join(process.cmdline()))
    victim.send_signal(signal.SIGKILL)
    server.until(lambda: server.status() == 503, within_s=10)
    server.until(lambda: server.status() == 200, within_s=120)
    server.until(lambda: re.search(rf"rank \d on .* \(pid {victim.pid}\) was lost", server.log.read_text()) is not None, within_s=10)

    family |= server.family()
    begun = time.monotonic()
    os.killpg(server.process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    server.process.wait(30)
    assert time.monotonic() - begun < 10
    _, alive = psutil.wait_procs(family, timeout=1)
    assert not alive
    assert "Traceback" not in server.log.read_text().rpartition("Ending")[2]


def test_what_a_killed_server_had_started_ends_as_well(server: Server) -> None:
    family = server.family()
    server.process.kill()
    server.process.wait(5)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
