"""A host is killed, frozen or cut off, or it is the head that dies and comes back with what Redis kept: clients of the other host's proxy
see nothing of it."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.system.ray_host import ROOT, Place, RayHost, kill_host, ray_head, ray_worker
from tests.system.server import eventually
from tests.system.tiny_model import write_tiny
from tests.system.two_hosts import Cable, possible, two_hosts

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not possible(), reason="network namespaces need root and iproute2"),
]

HTTP, GRPC, REDIS, GCS = 8000, 9000, 6390, 6379
MANTA = (sys.executable, "-m", "serve")
SETTINGS = (
    *("model.name=tiny", "runner.dtype=float32", "runner.num_threads=1", "runner.kv_cache_bytes=4000000"),
    *("fronts.host_resource=fronts", "http.host=0.0.0.0", f"http.port={HTTP}", f"grpc.port={GRPC}"),
)
TRAFFIC = """
import json, select, sys
from tests.system.streaming import Streams, stream
url = sys.argv[1]
golden = stream(url, 1500)
print("begun", flush=True)
with Streams(url, golden) as streams:
    asked = "?\\n"
    while asked == "?\\n":
        streams.keep(4, 1500)
        if select.select([sys.stdin], [], [], 0.2)[0] and (asked := sys.stdin.readline()) == "?\\n":
            print(streams.num_whole, flush=True)
print("over", json.dumps({"whole": streams.num_whole, "wrong": streams.wrong}))
"""


@contextmanager
def streaming_at(place: Place, environment: Mapping[str, str]) -> Iterator[Callable[[int], None]]:
    """Four streams at any time, by the proxy of ``place``, each of which must be whole and the same. What is given waits until so many
    more are."""
    command = [*place.prefix(), sys.executable, "-c", TRAFFIC, f"http://{place.ip}:{HTTP}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(environment)) as traffic:
        assert traffic.stdout is not None
        assert traffic.stdout.readline() == "begun\n"

        def num_whole() -> int:
            assert traffic.stdin is not None
            assert traffic.stdout is not None
            traffic.stdin.write("?\n")
            traffic.stdin.flush()
            return int(traffic.stdout.readline())

        def more(count: int) -> None:
            wanted = num_whole() + count
            eventually(lambda: num_whole() >= wanted, 240)

        yield more
        told, _ = traffic.communicate("over\n", timeout=400)
    seen = json.loads(told.rpartition("over ")[2])
    assert not seen["wrong"]
    assert seen["whole"] >= 4
    print(f"{seen['whole']} streams, all whole and the same")


def up(head: RayHost, folder: Path, *settings: str) -> None:
    given = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    head.run(*MANTA, "up", str(folder), *given, timeout_s=400)


def status(head: RayHost) -> dict:
    """Empty where nothing can be told. `manta status` leaves with 1 where something is not as it should be."""
    done = head.run(*MANTA, "status", "--json", check=False)
    return json.loads(done.stdout) if done.stdout.strip() else {}


def ready(head: RayHost) -> list[dict]:
    return [replica for replica in status(head).get("replicas", ()) if replica["state"] == "ready"]


def serving(host: RayHost) -> set[int]:
    """Processes of front, replica, rank and proxy."""
    names = ("ray::Worker", "ray::ServeReplica", "ray::ProxyActor")
    return {process.pid for process in host.descendants if process.name().startswith(names)}


@dataclass(frozen=True)
class TwoReplicas:
    """A head with the front and a replica, and a worker with the other replica."""

    cable: Cable
    head: RayHost
    worker: RayHost


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoReplicas]:
    folder = write_tiny(tmp_path_factory.mktemp("model") / "tiny")
    with ExitStack() as stack:
        cable = stack.enter_context(two_hosts())
        head = stack.enter_context(ray_head(num_cpus=2, place=cable.places[0], dashboard=False, resources='{"fronts": 1}'))
        worker = stack.enter_context(ray_worker(head, cable.places[1], num_cpus=2))
        up(head, folder, "replicas.count=2", "router.stall_timeout_s=5")
        eventually(lambda: len(ready(head)) == 2, 120)
        assert ranks(worker), "a replica on each host"
        yield TwoReplicas(cable, head, worker)


def ranks(host: RayHost) -> list[psutil.Process]:
    return [process for process in host.descendants if process.name().startswith("ray::Worker")]


@pytest.mark.parametrize("fault", ["frozen", "cut off", "killed"])
def test_streams_of_a_lost_host_go_on_at_the_other(two_replicas: TwoReplicas, fault: str) -> None:
    cable, head, worker = two_replicas.cable, two_replicas.head, two_replicas.worker
    with streaming_at(head.place, head.environment) as more:
        more(4)
        if fault == "frozen":
            frozen = [psutil.Process(worker.process.pid), *worker.descendants]
            for process in frozen:
                process.suspend()
            more(12)
            for process in frozen:
                process.resume()
        elif fault == "cut off":
            cable.cut()
            more(12)
            cable.mend()
        else:
            kill_host(worker)
        more(12)


@contextmanager
def redis_at(place: Place) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rd-", dir="/tmp") as folder:
        command = ["redis-server", "--bind", place.ip, "--port", str(REDIS), "--dir", folder, "--save", "", "--protected-mode", "no"]
        with subprocess.Popen([*place.prefix(), *command], stdout=subprocess.DEVNULL) as process:
            try:
                yield f"{place.ip}:{REDIS}"
            finally:
                process.terminate()


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")
def test_streams_on_another_host_outlive_the_head(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    kept = Path(tempfile.mkdtemp(prefix="mh-", dir="/tmp"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, kept, ignore_errors=True)
        here, there = stack.enter_context(two_hosts()).places
        own = {"RAY_REDIS_ADDRESS": stack.enter_context(redis_at(there)), "RAY_gcs_rpc_server_reconnect_timeout_s": "300"}

        def new_head() -> RayHost:
            return stack.enter_context(ray_head(num_cpus=0, place=here, dashboard=False, environment=own, port=GCS, folder=kept))

        head = new_head()
        worker = stack.enter_context(ray_worker(head, there, num_cpus=2, resources='{"fronts": 1}', environment=own))
        up(head, folder)
        with streaming_at(there, worker.environment) as more:
            before = serving(worker)
            kill_host(head)
            more(12)
            head = new_head()
            eventually(lambda: len(ready(head)) == 1, 240)
            assert serving(worker) == before, "nobody on the other host has ended"
            (rank,) = ranks(worker)
            rank.kill()
            eventually(lambda: ranks(worker) not in ([], [rank]), 120)  # so Ray is whole
            more(12)
