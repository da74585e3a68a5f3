"""The server under test: two replicas of two ranks each, two fronts; finds its processes, and checks whether it has recovered."""

import asyncio
import contextlib
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio
import httpx
import psutil

from serve.grpc.generated import admin_pb2, admin_pb2_grpc
from tests.processes import is_alive, named
from tests.system.server import serving
from tests.system.tiny_model import write_tiny

BUSY_S = 240.0
"""Timeout for the recovery."""
SETTINGS = """
model: {{source: {folder}, name: tiny}}
parallel: {{tensor: 2}}
runner: {{dtype: float32, num_threads: 1, kv_cache_bytes: {kv_bytes}}}
engine: {{max_running: 16}}
replicas: {{count: 2}}
fronts: {{count: 2}}
http: {{slow_client_timeout_s: 3}}
ray: {{temp_dir: {ray}}}
"""
LIMITS = """
replica: {step_timeout_s: 8, freeze_timeout_s: 1.5, progress_timeout_s: 3, canary_every_s: 1, canary_timeout_s: 3, max_restarts: 100000,
  restart_backoff_s: 0.0}
router: {stall_timeout_s: 5, replica_silence_s: 3, max_resumes: 1000000, ready_wait_s: 120, quarantine_s: 5}
"""
"""The timeouts are short, because what they wait for takes milliseconds here."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The processes of a complete server."""

    replicas: int
    ranks: int
    """Ranks of each replica."""
    fronts: int
    proxies: int


ONE_HOST = Shape(replicas=2, ranks=2, fronts=2, proxies=1)


class Running(Protocol):
    """A started server, such as `tests.system.server.Server`."""

    @property
    def url(self) -> str: ...
    @property
    def grpc(self) -> str: ...
    @property
    def descendants(self) -> list[psutil.Process]: ...
    @property
    def lines(self) -> list[str]: ...


@dataclass
class Victims:
    """A running server: finds its processes by their role, and arms failpoints in a folder."""

    server: Running
    failpoints: Path
    disk: Path | None
    """Where its Ray writes, if that is a small disk that may be filled."""
    shape: Shape

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def target(self) -> str:
        return self.server.grpc.removeprefix("grpc://")

    def named(self, *beginnings: str) -> list[psutil.Process]:
        return sorted(filter(is_alive, named(self.server.descendants, *beginnings)), key=lambda process: process.pid)

    def ranks(self) -> list[psutil.Process]:
        return self.named("ray::Worker")

    def replicas(self) -> list[psutil.Process]:
        return [process for process in self.named("ray::ServeReplica") if "Engine" in process.name()]

    def fronts(self) -> list[psutil.Process]:
        return [process for process in self.named("ray::ServeReplica") if "Front" in process.name()]

    def proxies(self) -> list[psutil.Process]:
        return self.named("ray::ProxyActor")

    def controllers(self) -> list[psutil.Process]:
        return self.named("ray::ServeController")

    async def ask(self, method: str, request: object, timeout_s: float = 5.0) -> object:
        """Call a method of the admin service."""
        async with grpc.aio.insecure_channel(self.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            return await getattr(admin_pb2_grpc.AdminServiceStub(channel), method)(request, timeout=timeout_s)

    async def records(self) -> list[admin_pb2.Replica]:
        answer = await self.ask("GetServerInfo", admin_pb2.GetServerInfoRequest())
        return list(answer.replicas)  # type: ignore[attr-defined]

    async def whole(self, gone: frozenset[int] = frozenset()) -> str:
        """What is still missing; empty once all replicas make tokens, fronts and proxy answer, and no process of ``gone`` is left."""
        try:
            records = [record for record in await self.records() if record.state == admin_pb2.REPLICA_STATE_READY]
            async with httpx.AsyncClient(timeout=5) as http:
                if (await http.get(f"{self.url}/readyz")).status_code != 200:
                    return "not ready over HTTP"
        except (grpc.aio.AioRpcError, httpx.HTTPError) as error:
            return f"no answer: {error!r}"
        living = {process.pid for process in (*self.ranks(), *self.replicas(), *self.fronts(), *self.proxies(), *self.controllers())}
        pids = {rank.pid for record in records for rank in record.ranks} | {record.pid for record in records}
        shape = self.shape
        if len(records) != shape.replicas or len(pids) != shape.replicas * (shape.ranks + 1):
            return f"{len(records)} replicas ready, {len(pids)} of their processes"
        if pids - living or gone & living:
            return f"told of {sorted(pids - living)} that are gone; still there: {sorted(gone & living)}"
        if (len(self.fronts()), len(self.proxies())) != (shape.fronts, shape.proxies) or not self.controllers():
            return f"{len(self.fronts())} fronts, {len(self.proxies())} proxies, {len(self.controllers())} controllers"
        return "" if len(self.ranks()) == shape.replicas * shape.ranks else f"{len(self.ranks())} ranks"

    async def wait_until_recovered(self, gone: frozenset[int] = frozenset(), within_s: float = BUSY_S) -> float:
        """Wait until `whole` returns nothing; returns the seconds. Raises AssertionError after ``within_s``."""
        loop = asyncio.get_running_loop()
        begun, missing = loop.time(), "?"
        while loop.time() - begun < within_s:
            if not (missing := await self.whole(gone)):
                return loop.time() - begun
            await asyncio.sleep(0.2)
        raise AssertionError(f"not whole after {within_s:g} s: {missing}")

    async def leftovers(self, within_s: float = 5.0) -> list[str]:
        """KV blocks, choices and requests that are still held ``within_s`` after the last request (contract: G8)."""
        loop = asyncio.get_running_loop()
        begun, held = loop.time(), ["?"]
        while held and loop.time() - begun < within_s + 1.0:  # loads are told once a second
            try:
                load = await self.ask("GetLoad", admin_pb2.GetLoadRequest())
            except grpc.aio.AioRpcError as error:
                held = [f"the load is not told: {error.code().name}"]
            else:
                held = [f"{one.id} holds {one.kv_blocks_used} blocks, {one.running} run" for one in load.replicas if _holds(one)]  # type: ignore[attr-defined]
                held += [f"{load.open_requests} open requests"] if load.open_requests else []  # type: ignore[attr-defined]
            await asyncio.sleep(0.2)
        return held

    async def resumed(self) -> int:
        """Resumed choices, as counted by the metrics; the counts of fronts that died are lost."""
        return await self.counted("manta_resumes_total")

    async def counted(self, name: str) -> int:
        """The value of a metrics counter, summed over its labels."""
        try:
            async with httpx.AsyncClient(timeout=5) as http:
                page = (await http.get(f"{self.url}/metrics")).text
        except httpx.HTTPError:
            return 0
        lines = [line for line in page.splitlines() if line.startswith(f"{name}{{")]
        return round(sum(float(line.rpartition(" ")[2]) for line in lines))


def _holds(one: admin_pb2.ReplicaLoad) -> bool:
    return bool(one.running or one.waiting or one.kv_blocks_used)


@contextlib.contextmanager
def server_under_test(*, kv_bytes: int = 1_000_000, more: str = "", keep_logs: Path | None = None) -> Iterator[Victims]:
    """``kv_bytes``: KV cache of a rank, by default about 3,900 tokens. ``keep_logs``: folder to which Ray's logs are copied at the end."""
    with tempfile.TemporaryDirectory(prefix="mf-", dir="/tmp") as made, _small_disk(Path(made)) as disk:
        place = Path(made)
        failpoints = place / "fail"
        failpoints.mkdir()
        file = place / "manta.yaml"
        ray = (disk or place) / "r"
        file.write_text(SETTINGS.format(folder=write_tiny(place / "tiny"), kv_bytes=kv_bytes, ray=ray) + LIMITS + more)
        with serving("-c", str(file), environment={"MANTA_FAILPOINTS": str(failpoints), "OMP_NUM_THREADS": "1"}) as server:
            try:
                yield Victims(server, failpoints, disk, ONE_HOST)
            finally:
                if keep_logs is not None:
                    shutil.copytree(ray / "session_latest" / "logs", keep_logs, dirs_exist_ok=True)


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[Path | None]:
    """A disk that can be filled without harm to others; None where this user cannot mount one."""
    folder = place / f"d{secrets.token_hex(1)}"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
