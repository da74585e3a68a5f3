"""One replica over two hosts that have nothing in common but a cable."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.system.ray_host import RayHost, ray_head, ray_worker
from tests.system.server import eventually
from tests.system.two_hosts import possible, two_hosts

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1500)]

HTTP, GRPC = 8000, 9000
MANTA = (sys.executable, "-m", "serve")
ASKED = {"model": "demo", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 32}
TOLD = {"model": "demo", "prompt": "Once upon a time", "temperature": 0, "max_tokens": 1500, "ignore_eos": True, "stream": True}
SETTINGS = (
    *("parallel.pipeline=2", "runner.dtype=float32", "model.name=demo", "runner.kv_cache_bytes=400000000", "runner.num_threads=1"),
    *("resources.cpus=2", "fronts.host_resource=fronts", f"http.port={HTTP}", f"grpc.port={GRPC}"),
    *("replica.step_timeout_s=4", "replica.canary_every_s=1", "replica.canary_timeout_s=3"),
)


def curl(head: RayHost, path: str, body: dict | None = None) -> list[str]:
    asked = ["-H", "content-type: application/json", "-d", json.dumps(body)] if body else []
    return [*head.place.prefix(), "curl", "-s", "-N", "-m", "300", f"http://{head.place.ip}:{HTTP}{path}", *asked]


def ready(head: RayHost) -> bool:
    return (
        subprocess.run(
            [*head.place.prefix(), "curl", "-s", "-f", "-m", "4", f"http://{head.place.ip}:{HTTP}/readyz"], capture_output=True
        ).returncode
        == 0
    )


def ranks(host: RayHost) -> list[psutil.Process]:
    return [process for process in host.descendants if process.name().startswith("ray::Worker")]


def alive(head: RayHost) -> dict[str, bool]:
    """Of every host by its name, as `manta status` has it."""
    seen = json.loads(head.run(*MANTA, "status", "--json", check=False).stdout)
    return {host["name"]: host["alive"] for host in seen["hosts"]}


def listening(host: RayHost) -> set[str]:
    """Addresses on which the processes of ranks and replica listen."""
    ours = [process for process in host.descendants if process.name().startswith(("ray::Worker", "ray::ServeReplica"))]
    own = {f"{process.pid}" for process in ours}
    told = subprocess.run([*host.place.prefix(), "ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    return {line.split()[3].rpartition(":")[0] for line in told.splitlines() if any(f"pid={pid}," in line for pid in own)}


@pytest.mark.skipif(not possible(), reason="network namespaces need root and iproute2")
def test_a_replica_over_two_hosts_answers_and_a_cut_cable_is_told_and_leaves_nothing(demo_folder: Path) -> None:
    with (
        two_hosts() as cable,
        ray_head(num_cpus=3, place=cable.places[0], dashboard=False, resources='{"fronts": 1}') as head,
        ray_worker(head, cable.places[1], num_cpus=2) as worker,
    ):
        given = [word for setting in (*SETTINGS, f"http.host={head.place.ip}") for word in ("--set", setting)]
        head.run(*MANTA, "up", str(demo_folder), *given, timeout_s=600)
        assert (len(ranks(head)), len(ranks(worker))) == (1, 1), "a stage on each host"
        answer = json.loads(subprocess.run(curl(head, "/v1/chat/completions", ASKED), capture_output=True, check=True).stdout)
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert worker.place.ip in listening(worker), "the rank waits for its replica at its host's own address"

        stream = subprocess.Popen(curl(head, "/v1/completions", TOLD), stdout=subprocess.PIPE, text=True)
        assert stream.stdout is not None
        lines = [stream.stdout.readline() for _ in range(9)]
        assert all(line.startswith("data: ") or not line.strip() for line in lines), lines
        (far,) = ranks(worker)
        cut_at = time.monotonic()
        cable.cut()
        eventually(lambda: not ready(head), 60)
        print("not ready after", time.monotonic() - cut_at)
        rest, _ = stream.communicate(timeout=300)
        events = [json.loads(line.removeprefix("data: ")) for line in rest.splitlines() if line.startswith("data: {")]
        print("stream ended after", time.monotonic() - cut_at, events[-1])
        assert "error" in events[-1], "a typed error and no end as if it were complete"
        assert not any(choice["finish_reason"] for event in events if "choices" in event for choice in event["choices"])
        eventually(lambda: alive(head).get(str(worker.place.namespace)) is False, 120)
        psutil.wait_procs([far], timeout=180)
        assert not far.is_running(), "an orphan"
        print("the far rank ended by", time.monotonic() - cut_at)
