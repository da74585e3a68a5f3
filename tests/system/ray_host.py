"""A Ray started as an operator starts it: `ray start --block`, a process of its own with ports, folder and token of its own."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from serve import proxy_hook
from tests.system.server import eventually, free_ports

ROOT = Path(__file__).parents[2]
START_S = 180.0
END_S = 30.0


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
    family: set[psutil.Process] = field(default_factory=set)

    @property
    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def run(self, *command: str, timeout_s: float = 240.0, check: bool = True, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """A command as somebody with the token would type it on this host."""
        done = subprocess.run(command, env=dict(self.environment), cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done


@contextmanager
def ray_head(
    *, num_cpus: int = 4, environment: Mapping[str, str] | None = None, importable: bool = True, dashboard: bool = True
) -> Iterator[RayHost]:
    """``importable``: whether Manta is on the PYTHONPATH of this Ray's processes."""
    folder = Path(tempfile.mkdtemp(prefix="mh-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    gcs, web, agent, agent_grpc, metrics, client = free_ports(6)
    own = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "2",
        **(environment or {}),
    }
    path = {"PYTHONPATH": str(ROOT)} if importable else {}
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address", "127.0.0.1", "--port", str(gcs), "--num-cpus", str(num_cpus), "--temp-dir", str(folder / "ray")),
        *("--object-store-memory", str(96 << 20), "--metrics-export-port", str(metrics), "--ray-client-server-port", str(client)),
        *("--include-dashboard", str(dashboard).lower(), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(web)),
        *("--dashboard-agent-listen-port", str(agent), "--dashboard-agent-grpc-port", str(agent_grpc)),
    ]
    log = (folder / "start.log").open("wb")
    process = subprocess.Popen(
        command,
        env={**own, **path, **proxy_hook.variables(grpc_host="127.0.0.1")},
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    joining = {**own, "RAY_ADDRESS": f"127.0.0.1:{gcs}", "PYTHONPATH": str(ROOT)}
    host = RayHost(process, f"127.0.0.1:{gcs}", f"http://127.0.0.1:{web}", joining, folder)
    try:
        eventually(lambda: process.poll() is not None or b"Ray runtime started" in (folder / "start.log").read_bytes(), START_S)
        assert process.poll() is None, (folder / "start.log").read_text()
        yield host
    finally:
        end_host(process)
        shutil.rmtree(folder, ignore_errors=True)


def end_host(process: "subprocess.Popen[bytes]") -> None:
    """As its supervisor would: a request to end, and what has not ended after a while is killed."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + END_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
        process.wait(5)
    _, left = psutil.wait_procs(family, timeout=10)
    for one in left:
        one.kill()
    psutil.wait_procs(left, timeout=5)
