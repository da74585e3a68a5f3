"""A Ray started as an operator starts it: `ray start --block`, a process of its own with ports, folder and token of its own."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from serve import proxy_hook
from tests.processes import kill
from tests.system.server import eventually, free_ports

ROOT = Path(__file__).parents[2]
START_S = 400.0
END_S = 8.0
"""Ray itself takes longer with an application deployed, which nobody wants of a test."""


class HostDidNotStart(RuntimeError):
    """What `ray start` had written."""


@dataclass(frozen=True)
class Place:
    """Where a host stands: an address, and the network namespace that has it."""

    ip: str
    namespace: str | None = None

    def prefix(self, *, uts: bool = False) -> list[str]:
        """To be put before a command so that it runs there; with ``uts`` under the namespace's name as its host's name."""
        if self.namespace is None:
            return []
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.namespace} && exec "$@"', "sh"] if uts else []
        return ["ip", "netns", "exec", self.namespace, *named]


LOOPBACK = Place("127.0.0.1")


@dataclass
class RayHost:
    """A host of a Ray cluster."""

    process: subprocess.Popen[bytes]
    address: str
    """Of the head's GCS."""
    dashboard: str
    environment: Mapping[str, str]
    """For whoever joins: the token."""
    folder: Path
    place: Place = LOOPBACK

    @property
    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def run(self, *command: str, timeout_s: float = 240.0, check: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """A command as somebody with the token would type it on this host."""
        done = subprocess.run(
            [*self.place.prefix(), *command],
            env=dict(self.environment),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done


@contextmanager
def ray_head(
    *,
    num_cpus: int = 4,
    environment: Mapping[str, str] | None = None,
    importable: bool = True,
    dashboard: bool = True,
    place: Place = LOOPBACK,
    port: int | None = None,
    folder: Path | None = None,
    resources: str = "{}",
) -> Iterator[RayHost]:
    """``importable``: whether Manta is on the PYTHONPATH of this Ray's processes. ``folder`` and ``port``: of one that was there before."""
    kept = folder is not None
    folder = folder or Path(tempfile.mkdtemp(prefix="mh-", dir="/tmp"))
    token = folder / "token"
    if not token.exists():
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
    gcs, web, client = free_ports(3)
    gcs = port or gcs
    own = _environment(token, environment)
    command = [
        *("--head", "--port", str(gcs), "--ray-client-server-port", str(client), "--num-cpus", str(num_cpus), "--resources", resources),
        *("--include-dashboard", str(dashboard).lower(), "--dashboard-host", place.ip, "--dashboard-port", str(web)),
        *("--temp-dir", str(folder / f"ray{secrets.token_hex(2)}")),
    ]
    try:
        with _started(command, own, place, folder, importable=importable) as process:
            joining = {**own, "RAY_ADDRESS": f"{place.ip}:{gcs}", "PYTHONPATH": str(ROOT)}
            yield RayHost(process, f"{place.ip}:{gcs}", f"http://{place.ip}:{web}", joining, folder, place)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_worker(
    head: RayHost, place: Place, *, num_cpus: int, resources: str = "{}", environment: Mapping[str, str] | None = None
) -> Iterator[RayHost]:
    """Another host of the head's cluster."""
    folder = Path(tempfile.mkdtemp(prefix="mw-", dir="/tmp"))
    command = ["--address", head.address, "--num-cpus", str(num_cpus), "--resources", resources]
    try:
        with _started(command, {**head.environment, **(environment or {})}, place, folder, importable=True) as process:
            yield RayHost(process, head.address, head.dashboard, head.environment, folder, place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _environment(token: Path, more: Mapping[str, str] | None) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_worker_niceness": "0",  # beside other jobs Ray Serve's controller would not answer for minutes
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "2",
        **(more or {}),
    }


@contextmanager
def _started(
    arguments: Sequence[str], environment: Mapping[str, str], place: Place, folder: Path, *, importable: bool
) -> "Iterator[subprocess.Popen[bytes]]":
    metrics, agent, agent_grpc = free_ports(3)
    command = [
        *place.prefix(uts=True),
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--node-ip-address", place.ip),
        *("--object-store-memory", str(96 << 20), "--metrics-export-port", str(metrics)),
        *("--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(agent_grpc)),
        *arguments,
    ]
    path = {"PYTHONPATH": str(ROOT)} if importable else {}
    log = folder / f"start-{secrets.token_hex(2)}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**environment, **path, **proxy_hook.variables(grpc_host=place.ip)},
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        eventually(lambda: has_ended(process) or b"Ray runtime started" in log.read_bytes(), START_S)
        if has_ended(process):
            raise HostDidNotStart(log.read_text())
        yield process
    finally:
        end_host(process)


def has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """On a crowded machine Ray's raylet gives its agents too little time and ends itself, and `ray start` waits on."""
    if process.poll() is not None:
        return True
    try:
        children = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return True
    return any(_is_dead_raylet(child) for child in children)


def _is_dead_raylet(child: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return child.name() == "raylet" and child.status() == psutil.STATUS_ZOMBIE
    return False


def end_host(process: "subprocess.Popen[bytes]") -> None:
    """As its supervisor would: a request to end, and what has not ended after a while is killed."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + END_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    grace_s = 10.0
    if process.poll() is None:
        process.kill()
        process.wait(5)
        grace_s = 0.0
    _, left = psutil.wait_procs(family, timeout=grace_s)
    kill(left)
    psutil.wait_procs(left, timeout=5)
