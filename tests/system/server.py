"""`manta serve` as a user starts it: a process of its own, its greeting awaited, ended by Ctrl-C."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.processes import command_of, kill, named

START_S = 240.0
END_S = 30.0
PORTS = range(20_000, 30_000)
"""Above those that Ray gives to its workers, and below those that Linux gives to whoever asks for any."""


@dataclass
class Server:
    """A server that has said that it answers."""

    process: subprocess.Popen[str]
    http_port: int
    grpc_port: int
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"grpc://127.0.0.1:{self.grpc_port}"

    @property
    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def fronts(self) -> list[psutil.Process]:
        """The processes that speak HTTP and gRPC behind the proxy: replicas of Ray Serve's deployment of that name."""
        return [process for process in self.descendants if "FrontDeployment" in " ".join(command_of(process))]

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks: Ray actors named after their method."""
        return named(self.descendants, "ray::Worker")


@contextmanager
def serving(*arguments: str, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """Start, wait for the greeting, and in the end stop it as a person would."""
    http_port, grpc_port = free_ports(2)
    command = [sys.executable, "-m", "serve", "serve", *arguments, "--http-port", str(http_port), "--grpc-port", str(grpc_port)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        cwd=Path(__file__).parents[2],
        start_new_session=True,
    )
    server = Server(process, http_port, grpc_port)
    greeted = threading.Event()
    threading.Thread(target=_read, args=(server, greeted), daemon=True).start()
    try:
        if not greeted.wait(START_S) or process.poll() is not None:
            raise AssertionError("the server did not start:\n" + "\n".join(server.lines))
        yield server
    finally:
        _end(server)


def _end(server: Server) -> None:
    """As a terminal does on Ctrl-C: the whole process group is interrupted. Nothing may be left, and no traceback shown."""
    process = server.process
    if process.poll() is not None:
        return
    family = server.descendants
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(END_S)
    finally:
        _, left = psutil.wait_procs(family, timeout=20)
        kill(left)
        if process.poll() is None:
            process.kill()
    assert not left, f"left behind: {left}"
    assert "Traceback" not in "\n".join(server.lines).rpartition("Ending")[2]


def free_ports(count: int) -> list[int]:
    """Ports that nobody gets who asks the kernel or Ray for any: else another process could have one before the server binds it."""
    with ExitStack() as probing:
        ports: list[int] = []
        while len(ports) < count:
            port, probe = PORTS[secrets.randbelow(len(PORTS))], probing.enter_context(socket.socket())
            with suppress(OSError):  # in use
                probe.bind(("127.0.0.1", port))
                ports.append(port)
        return ports


def eventually(condition, timeout_s: float = 60.0):
    """The first true value of ``condition()``."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s:g} s: {condition}")


def _read(server: Server, greeted: threading.Event) -> None:
    assert server.process.stdout is not None
    for line in server.process.stdout:
        server.lines.append(line.rstrip())
        if "Ctrl-C ends it" in line:
            greeted.set()
    greeted.set()
