"""The head of a Ray cluster dies with everything on it, and comes back with what Redis kept: streams on the other host do not see it."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.system.ray_host import ROOT, Place, RayHost, kill_host, ray_head, ray_worker
from tests.system.server import eventually
from tests.system.tiny_model import write_tiny
from tests.system.two_hosts import possible, two_hosts

pytestmark = [
    pytest.mark.system,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not possible(), reason="network namespaces need root and iproute2"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
]

HTTP, GRPC, REDIS, GCS = 8000, 9000, 6390, 6379
LONG = 1500
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
    while not select.select([sys.stdin], [], [], 0.2)[0]:
        streams.keep(3, 1500)
print(json.dumps({"whole": streams.num_whole, "wrong": streams.wrong, "golden": golden}))
"""


@contextmanager
def redis_at(place: Place) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="rd-", dir="/tmp") as folder:
        command = ["redis-server", "--bind", place.ip, "--port", str(REDIS), "--dir", folder, "--save", "", "--protected-mode", "no"]
        with subprocess.Popen([*place.prefix(), *command], stdout=subprocess.DEVNULL) as process:
            try:
                yield f"{place.ip}:{REDIS}"
            finally:
                process.terminate()


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
        given = [word for setting in SETTINGS for word in ("--set", setting)]
        head.run(sys.executable, "-m", "serve", "up", str(folder), *given, timeout_s=400)

        url = f"http://{there.ip}:{HTTP}"
        command = [*there.prefix(), sys.executable, "-c", TRAFFIC, url]
        traffic = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=dict(worker.environment)
        )
        assert traffic.stdout is not None
        assert traffic.stdout.readline() == "begun\n"
        before = serving(worker)
        kill_host(head)
        head = new_head()
        eventually(lambda: status(head).get("applications") or status(head).get("replicas"), 240)
        eventually(lambda: any("ServeController" in process.name() for process in (*head.descendants, *worker.descendants)), 120)
        told, _ = traffic.communicate("over\n", timeout=300)
        seen = json.loads(told)
        assert not seen["wrong"]
        assert seen["whole"] > 3
        assert serving(worker) == before, "nobody on the other host has ended"
        print(f"{seen['whole']} streams, all whole and the same")

        (rank,) = [process for process in worker.descendants if process.name().startswith("ray::Worker")]
        rank.kill()
        psutil.wait_procs([rank], timeout=10)
        again = subprocess.run(command, input="over\n", capture_output=True, text=True, cwd=ROOT, env=dict(worker.environment), check=True)
        assert json.loads(again.stdout.splitlines()[-1])["golden"] == seen["golden"], "ranks are started again, so Ray is whole"


def serving(host: RayHost) -> set[int]:
    """Processes of front, replica, rank and proxy."""
    names = ("ray::Worker", "ray::ServeReplica", "ray::ProxyActor")
    return {process.pid for process in host.descendants if process.name().startswith(names)}


def status(head: RayHost) -> dict:
    done = head.run(sys.executable, "-m", "serve", "status", "--json", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else {}
