"""Replicas come and go over three hosts while streams run, and no stream is lost or changed: as many as the load asks for, and away from
a host that is to be taken."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import ray
from ray.serve.config import ProxyLocation

from cluster.directory import ReplicaRecord, current_records
from serve import proxy_hook
from serve.commands.resolve_models import models_for_cluster
from serve.commands.settings import load_settings
from serve.existing_ray import remove
from serve.rollout import deploy, start_proxies
from tests.system.ray_host import ROOT
from tests.system.server import eventually, free_ports
from tests.system.streaming import WAIT_S, Streams, stream
from tests.system.tiny_model import write_tiny

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1500)]

ADDRESSES = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
CPUS = 2
"""Of each host: room for one replica and not for two."""
SETTINGS = """
model: {{source: {folder}, name: tiny}}
runner: {{dtype: float32, num_threads: 1, kv_cache_bytes: 4000000}}
engine: {{max_running: 8}}
autoscaling: {{scale_down_after_s: 5, scale_to_zero_after_s: 5, ttft_target_s: 5}}
replica: {{drain_timeout_s: 1}}
fronts: {{host_resource: fronts}}
http: {{port: {http}}}
grpc: {{port: {grpc}}}
"""
LONG = 1500


@dataclass(frozen=True)
class Hosts:
    url: str
    address: str
    settings: Path

    def deploy(self, *settings: str) -> None:
        """Serve so instead of as before."""
        config = load_settings(self.settings, list(settings), {}).config
        start_proxies(config, ProxyLocation.HeadOnly)
        deploy(models_for_cluster(config), config, app=config.ray.app, on_progress=lambda _doing, _done: None)

    def replicas(self) -> list[ReplicaRecord]:
        return [record for record in current_records("manta") if record.ready]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    from ray.cluster_utils import Cluster

    place = tmp_path_factory.mktemp("three")
    http, grpc = free_ports(2)
    settings = place / "manta.yaml"
    settings.write_text(SETTINGS.format(folder=write_tiny(place / "tiny"), http=http, grpc=grpc))
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as made, pytest.MonkeyPatch.context() as patch:
        folder = Path(made)
        (folder / "ray").mkdir()  # the cluster writes its address there, in a folder that others make
        environment = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": made + "/no-token", "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"RAY_raylet_start_wait_time_s": "300", "RAY_TMPDIR": made, "TMPDIR": made, "PYTHONPATH": str(ROOT)}
        for name, value in (environment | dict(proxy_hook.variables(grpc_host="127.0.0.1"))).items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", made)
        cluster = Cluster()
        try:
            for address in ADDRESSES:
                kind = {"resources": {"fronts": 1}} if address == ADDRESSES[0] else {}
                own = {"temp_dir": made, "object_store_memory": 100 * 2**20, "include_dashboard": False}
                cluster.add_node(wait=False, num_cpus=CPUS, node_ip_address=address, **own, **kind)
                cluster.wait_for_nodes(300)
            ray.init(address=cluster.address, namespace="manta", log_to_driver=False, _node_ip_address=ADDRESSES[0])
            yield Hosts(f"http://127.0.0.1:{http}", cluster.address, settings)
            remove("manta")
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_from_zero_to_three_and_back_without_losing_a_stream(hosts: Hosts) -> None:
    hosts.deploy("replicas.min=0", "replicas.max=3")
    assert not hosts.replicas()
    golden = stream(hosts.url, LONG)
    assert len(hosts.replicas()) == 1

    with Streams(hosts.url, golden) as streams:
        until = time.monotonic() + WAIT_S
        while len(hosts.replicas()) < 3 and time.monotonic() < until:
            streams.keep(30)
            time.sleep(0.5)
        assert len(hosts.replicas()) == 3, "more than two can answer"
        streams.keep(30)
        while len(hosts.replicas()) > 1 and time.monotonic() < until + WAIT_S:
            streams.keep(2, LONG)  # some on each that goes
            time.sleep(0.5)
        assert len(hosts.replicas()) == 1, "one answers all that is asked for"
        streams.keep(2, LONG)
    assert not streams.wrong
    assert streams.num_whole > 30
    print(f"{streams.num_whole} streams, all whole and the same")

    eventually(lambda: not hosts.replicas() or None, WAIT_S)
    assert stream(hosts.url, LONG) == golden


def test_a_host_that_is_to_be_taken_is_left_and_no_stream_is_lost(hosts: Hosts) -> None:
    hosts.deploy("replicas.count=2")
    eventually(lambda: len(hosts.replicas()) == 2 or None, WAIT_S)
    golden = stream(hosts.url, LONG)
    nodes = {record.address.node: record.id for record in hosts.replicas()}
    assert len(nodes) == 2
    leaving = next(node for node in nodes if node != ray.get_runtime_context().get_node_id())  # the head's is never taken
    with Streams(hosts.url, golden) as streams:
        streams.keep(6, LONG)
        told = [*("--node-id", leaving, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "it is to be taken")]
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", hosts.address, *told]
        subprocess.run([*command, "--deadline-remaining-seconds", "300"], check=True, capture_output=True, timeout=120)
        until = time.monotonic() + WAIT_S
        while nodes[leaving] in {record.id for record in current_records("manta")} and time.monotonic() < until:
            streams.keep(6, LONG)
            time.sleep(0.5)
    left = {record.address.node for record in hosts.replicas()}
    assert leaving not in left
    assert len(left) == 2, "there was room on the third"
    assert not streams.wrong
    assert httpx.get(f"{hosts.url}/readyz").status_code == 200
    print(json.dumps({"streams": streams.num_whole, "left": leaving, "now at": sorted(left)}))
