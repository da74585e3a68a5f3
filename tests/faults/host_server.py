"""The server under test on three hosts: the head, a host with the front and a replica, and one with another replica.

Each is a network namespace with a Ray of its own, and starts anew when it has ended, as its supervisor would see to.
"""

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.server import LIMITS, Shape, Victims
from tests.processes import kill, name_of
from tests.system.network import Network, network
from tests.system.ray_host import Place, RayHost, has_ended, ray_head, ray_worker
from tests.system.tiny_model import write_tiny

HTTP, GRPC, REDIS, GCS = 8000, 9000, 6390, 6379
SHAPE = Shape(replicas=2, ranks=1, fronts=1, proxies=3)
SETTINGS = """
model: {{source: {folder}, name: tiny}}
runner: {{dtype: float32, num_threads: 1, kv_cache_bytes: 2000000}}
engine: {{max_running: 16}}
resources: {{one_host: true}}
replicas: {{count: 2}}
fronts: {{count: 1, host_resource: fronts}}
http: {{host: 0.0.0.0, port: 8000}}
grpc: {{host: 0.0.0.0, port: 9000}}
"""
KEPT_BY_REDIS = {"RAY_gcs_rpc_server_reconnect_timeout_s": "300"}
"""How long Ray's other hosts wait for a head that is down; the default is 60 s."""
FAST_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""Makes the head give up a silent host after about 12 s instead of 65 s."""
MANTA = (sys.executable, "-m", "serve")


class Host:
    """A host: a network namespace with a Ray that can be restarted."""

    def __init__(self, name: str, start: Callable[[], AbstractContextManager[RayHost]]) -> None:
        self.name, self._start, self._stack = name, start, ExitStack()
        self.ray = self._stack.enter_context(start())
        self._seen: list[psutil.Process] = []

    def family(self) -> list[psutil.Process]:
        """All processes of the host. They are remembered, so that `start_anew` also ends those whose parent has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen = [psutil.Process(self.ray.process.pid), *self.ray.descendants]
            return self._seen
        return []

    def kill(self) -> frozenset[int]:
        """Kill all processes at once, as a power failure would. Returns their pids."""
        family = self.family()
        kill(family)
        self.ray.process.wait()
        return frozenset(process.pid for process in family)

    def start_anew(self) -> None:
        """Restart Ray, with no process of before left."""
        seen = self._seen
        self.kill()
        self.close()
        kill(seen)
        self._stack = ExitStack()
        self.ray = self._stack.enter_context(self._start())
        self._seen = []

    def supervise(self) -> None:
        if has_ended(self.ray.process):
            self.start_anew()
        self.family()

    def close(self) -> None:
        self._stack.close()


@dataclass
class Hosts:
    """The three hosts as the server that `Victims` expects."""

    network: Network
    head: Host
    near: Host
    """The host with the front; clients connect to its proxy."""
    far: Host

    url: str = field(init=False)
    grpc: str = field(init=False)

    def __post_init__(self) -> None:
        ip = self.near.ray.place.ip
        self.url, self.grpc = f"http://{ip}:{HTTP}", f"grpc://{ip}:{GRPC}"

    @property
    def all(self) -> tuple[Host, ...]:
        return self.head, self.near, self.far

    @property
    def descendants(self) -> list[psutil.Process]:
        return [process for host in self.all for process in host.family()]

    @property
    def lines(self) -> list[str]:
        return [f"{host.name}: {process.pid} {name_of(process)}" for host in self.all for process in host.family()]


@dataclass
class HostVictims(Victims):
    hosts: Hosts

    async def whole(self, gone: frozenset[int] = frozenset()) -> str:
        for host in self.hosts.all:
            await asyncio.to_thread(host.supervise)
        return await super().whole(gone)


@contextlib.contextmanager
def hosts_under_test(*, keep_logs: Path | None = None) -> Iterator[HostVictims]:
    """``keep_logs``: a folder to which the hosts' Ray logs are copied at the end."""
    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mh-", dir="/tmp")))
        switch = stack.enter_context(network(3))
        led, served, other = switch.places
        redis = stack.enter_context(redis_at(switch.outside.place))
        own = {"RAY_REDIS_ADDRESS": redis, **KEPT_BY_REDIS, **FAST_HEALTH_CHECKS, "OMP_NUM_THREADS": "1"}
        kept = made / "head"
        kept.mkdir()
        if keep_logs is not None:
            stack.callback(_keep_logs, kept, keep_logs)

        def started(name: str, start: Callable[[], AbstractContextManager[RayHost]]) -> Host:
            host = Host(name, start)
            stack.callback(host.close)
            stack.callback(host.kill)  # a Ray that is asked to end takes half a minute
            return host

        head = started("head", lambda: ray_head(num_cpus=0, place=led, dashboard=False, environment=own, port=GCS, folder=kept))
        fronts = '{"fronts": 1}'
        near = started("near", lambda: ray_worker(head.ray, served, num_cpus=2, environment=own, resources=fronts))
        far = started("far", lambda: ray_worker(head.ray, other, num_cpus=2, environment=own))
        settings = made / "manta.yaml"
        settings.write_text(SETTINGS.format(folder=write_tiny(made / "tiny")) + LIMITS)
        head.ray.run(*MANTA, "up", "-c", str(settings), timeout_s=400)
        hosts = Hosts(switch, head, near, far)
        yield HostVictims(hosts, made, None, SHAPE, hosts)


def _keep_logs(kept: Path, folder: Path) -> None:
    """Copy the logs. All hosts log to a folder that the head chooses; a restarted head chooses another one."""
    for number, logs in enumerate(sorted(kept.glob("ray*/session_2*/logs"))):
        shutil.copytree(logs, folder / str(number), dirs_exist_ok=True, ignore_dangling_symlinks=True)


@contextlib.contextmanager
def redis_at(place: Place) -> Iterator[str]:
    """host:port of a Redis without persistence."""
    with tempfile.TemporaryDirectory(prefix="rd-", dir="/tmp") as folder:
        command = ["redis-server", "--bind", place.ip, "--port", str(REDIS), "--dir", folder, "--save", "", "--protected-mode", "no"]
        with subprocess.Popen([*place.prefix(), *command], stdout=subprocess.DEVNULL) as process:
            try:
                yield f"{place.ip}:{REDIS}"
            finally:
                process.terminate()
