"""One replica over two hosts that have nothing in common but a cable."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.system.ray_host import RayHost, ray_head, ray_worker
from tests.system.server import eventually
from tests.system.two_hosts import Cable, possible, two_hosts

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not possible(), reason="network namespaces need root and iproute2"),
]

HTTP, GRPC = 8000, 9000
MANTA = (sys.executable, "-m", "serve")
ASKED = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 32}
TOLD = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 1500, "ignore_eos": True, "stream": True}
SETTINGS = (
    *("runner.dtype=float32", "model.name=demo", "runner.kv_cache_bytes=400000000", "runner.num_threads=1"),
    *("resources.cpus=2", "fronts.host_resource=fronts", f"http.port={HTTP}", f"grpc.port={GRPC}"),
    *("router.ready_wait_s=5", "replica.canary_every_s=1", "replica.canary_timeout_s=3"),
)


@dataclass(frozen=True)
class Hosts:
    cable: Cable
    head: RayHost
    worker: RayHost

    def up(self, folder: Path, *settings: str) -> None:
        """Serve this instead of what was served before."""
        given = [word for setting in (*SETTINGS, f"http.host={self.head.place.ip}", *settings) for word in ("--set", setting)]
        self.head.run(*MANTA, "up", str(folder), *given, timeout_s=600)

    def ask(self, path: str, body: dict) -> dict:
        answer: dict = json.loads(subprocess.run(self.curl(path, body), capture_output=True, check=True).stdout)
        return answer

    def curl(self, path: str, body: dict) -> list[str]:
        asked = ["-H", "content-type: application/json", "-d", json.dumps({"model": "demo", **body})]
        return [*self.head.place.prefix(), "curl", "-s", "-N", "-m", "300", f"http://{self.head.place.ip}:{HTTP}{path}", *asked]

    def ready(self) -> bool:
        asked = ["curl", "-s", "-f", "-m", "4", f"http://{self.head.place.ip}:{HTTP}/readyz"]
        return subprocess.run([*self.head.place.prefix(), *asked], capture_output=True).returncode == 0

    def alive(self) -> dict[str, bool]:
        """Of every host by its name, as `manta status` has it."""
        seen = json.loads(self.head.run(*MANTA, "status", "--json", check=False).stdout)
        return {host["name"]: host["alive"] for host in seen["hosts"]}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        cable = stack.enter_context(two_hosts())
        head = stack.enter_context(ray_head(num_cpus=3, place=cable.places[0], dashboard=False, resources='{"fronts": 1}'))
        yield Hosts(cable, head, stack.enter_context(ray_worker(head, cable.places[1], num_cpus=2)))


def ranks(host: RayHost) -> list[psutil.Process]:
    return [process for process in host.descendants if process.name().startswith("ray::Worker")]


def listening(host: RayHost) -> set[str]:
    """Addresses on which the processes of ranks and replica listen."""
    ours = [process for process in host.descendants if process.name().startswith(("ray::Worker", "ray::ServeReplica"))]
    own = {f"{process.pid}" for process in ours}
    told = subprocess.run([*host.place.prefix(), "ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    return {line.split()[3].rpartition(":")[0] for line in told.splitlines() if any(f"pid={pid}," in line for pid in own)}


def test_a_replica_over_two_hosts_answers_and_a_cut_cable_is_told_and_leaves_nothing(hosts: Hosts, demo_folder: Path) -> None:
    hosts.up(demo_folder, "parallel.pipeline=2")
    assert (len(ranks(hosts.head)), len(ranks(hosts.worker))) == (1, 1), "a stage on each host"
    assert "Paris" in hosts.ask("/v1/chat/completions", ASKED)["choices"][0]["message"]["content"]
    assert hosts.worker.place.ip in listening(hosts.worker), "the rank waits for its replica at its host's own address"

    stream = subprocess.Popen(hosts.curl("/v1/completions", TOLD), stdout=subprocess.PIPE, text=True)
    assert stream.stdout is not None
    lines = [stream.stdout.readline() for _ in range(9)]
    assert all(line.startswith("data: ") or not line.strip() for line in lines), lines
    (near,), (far,) = ranks(hosts.head), ranks(hosts.worker)
    cut_at = time.monotonic()
    hosts.cable.cut()
    eventually(lambda: not hosts.ready(), 60)
    print(f"not ready after {time.monotonic() - cut_at:.1f} s")
    rest, _ = stream.communicate(timeout=300)
    events = [json.loads(line.removeprefix("data: ")) for line in rest.splitlines() if line.startswith("data: {")]
    print(f"the stream ended after {time.monotonic() - cut_at:.1f} s:", events[-1])
    assert events[-1]["error"]["code"] == "host_lost", "a typed error and no end as if it were complete"
    assert f"host {hosts.worker.place.namespace}," in events[-1]["error"]["message"]
    assert not any(choice["finish_reason"] for event in events if "choices" in event for choice in event["choices"])
    psutil.wait_procs([near, far], timeout=120)
    assert not far.is_running(), "an orphan on the host that was cut off"
    assert not near.is_running(), "an orphan beside its replica"
    print(f"both ranks had ended by {time.monotonic() - cut_at:.1f} s")
    eventually(lambda: hosts.alive().get(str(hosts.worker.place.namespace)) is False, 180)
    assert not ranks(hosts.worker)
    print(f"Ray knew that the host was gone by {time.monotonic() - cut_at:.1f} s")
