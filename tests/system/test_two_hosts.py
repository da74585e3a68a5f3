"""One replica over two hosts that have nothing in common but a cable."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.processes import named
from tests.system.network import Network, network, possible
from tests.system.ray_host import RayHost, ray_head, ray_worker
from tests.system.server import eventually
from tests.system.tiny_model import write_tiny, write_tiny_57b

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
    *("runner.dtype=float32", "runner.kv_cache_bytes=100000000", "runner.num_threads=1"),
    *("fronts.host_resource=fronts", f"http.port={HTTP}", f"grpc.port={GRPC}"),
    *("router.ready_wait_s=5", "replica.canary_every_s=1", "replica.canary_timeout_s=3"),
)
ONE_RANK_EACH = """
resources: {{cpus: 1}}
models:
- {{model: {{source: {dense}, name: dense}}}}
- {{model: {{source: {sparse}, name: sparse}}}}
"""
PROMPTS = ("Once upon a time", "def hello(name):\n    return", "a")
NUM_TOKENS = 16
ONE_PER_HOST, TWO_PER_HOST, NO_THREE_PER_HOST = ("resources.cpus=2",), ("resources.cpus=1",), ("resources.cpus=1.1",)
"""By the CPUs that the hosts have."""
OVER_TWO_HOSTS = {
    "tp 2": ("dense", ("parallel.tensor=2", *ONE_PER_HOST, "resources.ranks_per_host=1"), 2),
    "tp 3": ("dense", ("parallel.tensor=3", *NO_THREE_PER_HOST, "resources.ranks_per_host=2"), 3),
    "pp 2": ("dense", ("parallel.pipeline=2", *ONE_PER_HOST), 2),
    "dp 2": ("dense", ("parallel.data=2", *ONE_PER_HOST), 2),
    "ep 2": ("sparse", ("parallel.data=2", "parallel.expert=2", *ONE_PER_HOST), 2),
    "tp 2 x dp 2 x ep 4, experts held twice": (
        "sparse",
        ("parallel.tensor=2", "parallel.data=2", "parallel.expert=4", "runner.redundant_experts=2", *TWO_PER_HOST),
        4,
    ),
}
"""A layout's name, the model, the settings, and how many ranks that is."""


@dataclass(frozen=True)
class Hosts:
    network: Network
    head: RayHost
    worker: RayHost
    worker_cache: Path
    """The worker's $MANTA_CACHE: a small disk of its own."""

    def up(self, *what: str, settings: Sequence[str] = (), check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Serve this instead of what was served before."""
        given = [word for setting in (*SETTINGS, f"http.host={self.head.place.ip}", *settings) for word in ("--set", setting)]
        return self.head.run(*MANTA, "up", *what, *given, timeout_s=600, check=check)

    def ask(self, path: str, body: dict) -> dict:
        answer: dict = json.loads(subprocess.run(self.curl(path, body), capture_output=True, check=True).stdout)
        return answer

    def curl(self, path: str, body: dict) -> list[str]:
        asked = ["-H", "content-type: application/json", "-d", json.dumps({"model": "demo", **body})]
        return [*self.head.place.prefix(), "curl", "-s", "-N", "-m", "300", f"http://{self.head.place.ip}:{HTTP}{path}", *asked]

    def ready(self) -> bool:
        asked = ["curl", "-s", "-f", "-m", "4", f"http://{self.head.place.ip}:{HTTP}/readyz"]
        return subprocess.run([*self.head.place.prefix(), *asked], capture_output=True).returncode == 0

    def answers(self, model: str) -> list[list[str]]:
        """Greedy tokens."""
        asked = {"model": model, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        choices = [self.ask("/v1/completions", {**asked, "prompt": prompt})["choices"][0] for prompt in PROMPTS]
        return [choice["logprobs"]["tokens"] for choice in choices]

    def alive(self) -> dict[str, bool]:
        """Of every host by its name, as `manta status` has it."""
        seen = json.loads(self.head.run(*MANTA, "status", "--json", check=False).stdout)
        return {host["name"]: host["alive"] for host in seen["hosts"]}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with ExitStack() as stack:
        cache = stack.enter_context(small_disk())
        both = stack.enter_context(network(2))
        head = stack.enter_context(ray_head(num_cpus=3, place=both.places[0], dashboard=False, resources='{"fronts": 1}'))
        worker = stack.enter_context(ray_worker(head, both.places[1], num_cpus=2, environment={"MANTA_CACHE": str(cache)}))
        yield Hosts(both, head, worker, cache)


@contextmanager
def small_disk() -> Iterator[Path]:
    """In no folder of pytest's, which tidies those up while something may still be mounted there."""
    at = Path(tempfile.mkdtemp(prefix="md-", dir="/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)
        at.rmdir()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"dense": write_tiny(tmp_path_factory.mktemp("dense")), "sparse": write_tiny_57b(tmp_path_factory.mktemp("sparse"))}


@pytest.fixture(scope="module")
def expected(hosts: Hosts, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[str]]]:
    """What one rank says of each model."""
    file = tmp_path_factory.mktemp("settings") / "manta.yaml"
    file.write_text(ONE_RANK_EACH.format(**models))
    hosts.up("-c", str(file))
    eventually(lambda: len(ranks(hosts.head) + ranks(hosts.worker)) == 2, 60)
    return {name: hosts.answers(name) for name in models}


def ranks(host: RayHost) -> list[psutil.Process]:
    return named(host.descendants, "ray::Worker")


def listening(host: RayHost) -> set[str]:
    """Addresses on which the processes of ranks and replica listen."""
    ours = named(host.descendants, "ray::Worker", "ray::ServeReplica")
    own = {f"{process.pid}" for process in ours}
    told = subprocess.run([*host.place.prefix(), "ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    return {line.split()[3].rpartition(":")[0] for line in told.splitlines() if any(f"pid={pid}," in line for pid in own)}


def test_a_host_that_is_not_fit_ends_the_start_and_is_named(hosts: Hosts, models: dict[str, Path]) -> None:
    with (hosts.worker_cache / "what fills the disk").open("wb") as file:
        file.write(b"x" * (64 << 20))
    try:
        refused = hosts.up(str(models["dense"]), settings=("parallel.pipeline=2", *ONE_PER_HOST), check=False)
    finally:
        os.unlink(file.name)
    assert refused.returncode == 1
    said = [line for line in refused.stderr.splitlines() if line.startswith("manta: ")]
    assert len(said) == 1, refused.stderr
    assert said[0].startswith(f"manta: {hosts.worker.place.namespace}: {hosts.worker_cache} has 0.0 GiB free; make room there"), said
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("layout", OVER_TWO_HOSTS)
def test_a_layout_over_two_hosts_answers_as_one_rank(
    layout: str, hosts: Hosts, models: dict[str, Path], expected: dict[str, list[list[str]]]
) -> None:
    model, settings, num_ranks = OVER_TWO_HOSTS[layout]
    name = layout.split(",")[0].replace(" ", "-")
    hosts.up(str(models[model]), settings=(f"model.name={name}", *settings))
    eventually(lambda: len(ranks(hosts.head) + ranks(hosts.worker)) == num_ranks, 60)  # those before may still be ending
    near, far = ranks(hosts.head), ranks(hosts.worker)
    assert {len(near), len(far)} == {num_ranks // 2, num_ranks - num_ranks // 2}, "ranks on both hosts"
    answers = hosts.answers(name)
    assert answers == expected[model]
    assert [len(tokens) for tokens in answers] == [NUM_TOKENS] * len(PROMPTS)
    print(f"{layout}: {len(near)} + {len(far)} ranks, {len(PROMPTS)} x {NUM_TOKENS} tokens as one rank says them")


def test_a_replica_over_two_hosts_answers_and_a_cut_cable_is_told_and_leaves_nothing(hosts: Hosts, demo_folder: Path) -> None:
    hosts.up(str(demo_folder), settings=("model.name=demo", "parallel.pipeline=2", *ONE_PER_HOST))
    assert (len(ranks(hosts.head)), len(ranks(hosts.worker))) == (1, 1), "a stage on each host"
    assert "Paris" in hosts.ask("/v1/chat/completions", ASKED)["choices"][0]["message"]["content"]
    assert hosts.worker.place.ip in listening(hosts.worker), "the rank waits for its replica at its host's own address"

    stream = subprocess.Popen(hosts.curl("/v1/completions", TOLD), stdout=subprocess.PIPE, text=True)
    assert stream.stdout is not None
    lines = [stream.stdout.readline() for _ in range(9)]
    assert all(line.startswith("data: ") or not line.strip() for line in lines), lines
    (near,), (far,) = ranks(hosts.head), ranks(hosts.worker)
    cut_at = time.monotonic()
    hosts.network.cut(hosts.worker.place)
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
