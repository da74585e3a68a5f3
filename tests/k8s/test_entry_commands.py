"""The rendered pods, started as processes: head, front and worker each in a network of its own, reached by the Service's ports."""

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from serve.demo_model import ensure_demo_model
from tests.k8s.chart import ROOT, Rendered, container, ready
from tests.k8s.pods import Node, Pod, can_start_pods, end
from tests.system.server import eventually

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.timeout(1500)]

START_S = 900.0


@dataclass
class Cluster:
    rendered: Rendered
    pods: dict[str, Pod]
    token: str

    def dashboard(self, path: str, body: object | None = None) -> dict:
        request = urllib.request.Request(
            f"http://{self.pods['head'].ip}:8265{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": f"Bearer {self.token}", "content-type": "application/json"},
            method="GET" if body is None else "PUT",
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"{}")

    def service(self, port: str) -> str:
        """host:port of a front, by a port of the rendered Service."""
        (found,) = (each for each in self.rendered.one("Service", "manta")["spec"]["ports"] if each["name"] == port)
        return f"{self.pods['front'].ip}:{found['targetPort']}"

    def logs(self) -> str:
        return "\n".join(f"{pod.name}: {pod.log.read_text()[-3000:]}" for pod in self.pods.values())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not can_start_pods():
        pytest.skip("pods are network namespaces, which need root, ip and unshare")
    cache = ensure_demo_model().parent
    rendered, token = ready("cpu-demo"), secrets.token_hex(32)
    config = rendered.one("ConfigMap", "manta")["data"]["manta.yaml"]
    with Node(tmp_path_factory.mktemp("pods"), token, cache).up() as node:
        made = Cluster(rendered, {}, token)
        made.pods["head"] = head = node.start("head", rendered.cluster["headGroupSpec"], config=config)
        eventually(lambda: answers(made, "/api/version"), START_S)
        for group in ("front", "cpu"):
            made.pods[group] = node.start(group, rendered.group(group), config=config, head=head.ip)
        made.dashboard("/api/serve/applications/", rendered.serve_config)
        try:
            eventually(lambda: is_ready(made), START_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{made.dashboard('/api/serve/applications/')}\n{made.logs()}") from None
        yield made


def answers(cluster: Cluster, path: str) -> bool:
    try:
        return bool(cluster.dashboard(path))
    except OSError:
        assert cluster.pods["head"].process.poll() is None, cluster.logs()
        return False


def is_ready(cluster: Cluster) -> bool:
    """What the front's readiness probe asks."""
    probe = container(cluster.rendered.group("front")["template"])["readinessProbe"]["httpGet"]
    try:
        with urllib.request.urlopen(f"http://{cluster.pods['front'].ip}:{probe['port']}{probe['path']}", timeout=5):
            return True
    except OSError:
        return False


def test_the_test_pods_command_gets_answers_over_http_and_grpc(cluster: Cluster) -> None:
    ask = container(cluster.rendered.one("Pod", "test-chat"))
    arguments = [
        argument.replace("manta:8000", cluster.service("http")).replace("manta:9000", cluster.service("grpc")) for argument in ask["args"]
    ]
    done = cluster.pods["cpu"].run("python", str(ROOT / "k8s" / "images" / "ask.py"), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "demo over HTTP" in done.stdout
    assert "demo over gRPC" in done.stdout


def test_metrics_are_told_where_the_chart_has_them_scraped(cluster: Cluster) -> None:
    (port,) = cluster.rendered.one("Service", "metrics")["spec"]["ports"]
    with urllib.request.urlopen(f"http://{cluster.pods['head'].ip}:{port['targetPort']}/metrics", timeout=30) as answer:
        assert b"manta_requests_running" in answer.read()


def test_fronts_and_ranks_are_on_the_hosts_of_their_groups(cluster: Cluster) -> None:
    details = cluster.dashboard("/api/serve/applications/")["applications"]["manta"]["deployments"]
    places = {
        name: {replica["node_ip"] for replica in deployment["replicas"]} for name, deployment in details.items() if deployment["replicas"]
    }
    for name, found in places.items():
        assert found == {cluster.pods["front" if name.startswith("Front") else "cpu"].ip}, places


def test_grpc_listens_on_the_pods_own_address_only(cluster: Cluster) -> None:
    done = cluster.pods["front"].run("ss", "-ltnH", "sport = :9000")
    listening = {line.split()[3].replace("[::ffff:", "").replace("]", "") for line in done.stdout.splitlines()}  # gRPC's way of IPv4
    assert listening == {f"{cluster.pods['front'].ip}:9000"}, done.stdout


def test_whoever_has_no_token_cannot_use_the_dashboard(cluster: Cluster) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{cluster.pods['head'].ip}:8265/api/serve/applications/", timeout=30)
    assert refused.value.code in (401, 403)


def test_the_startup_probe_finds_every_host_healthy(cluster: Cluster) -> None:
    for group in ("front", "cpu"):
        probe = container(cluster.rendered.group(group)["template"])["startupProbe"]["httpGet"]
        with urllib.request.urlopen(f"http://{cluster.pods[group].ip}:{probe['port']}{probe['path']}", timeout=30) as answer:
            assert answer.status == 200


def test_a_pod_drains_at_once_when_nobody_is_connected(cluster: Cluster) -> None:
    done = cluster.pods["front"].run(str(ROOT / "k8s" / "images" / "drain"), "60", timeout_s=40)
    assert done.returncode == 0, done.stderr


def test_a_host_of_replicas_is_left_when_their_streams_have_ended_and_the_head_when_nobody_is(cluster: Cluster) -> None:
    """The last test, as every pod's end: no replica is left, and no other pod."""
    drain = str(ROOT / "k8s" / "images" / "drain")
    body = {"model": "demo", "prompt": "Once", "max_tokens": 400, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"http://{cluster.service('http')}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer, ThreadPoolExecutor() as beside:
        first = answer.readline()
        last = beside.submit(cluster.pods["head"].run, drain, "3600", "--last", timeout_s=400)
        left = beside.submit(cluster.pods["cpu"].run, drain, "240", "--leave", timeout_s=280)
        lines = [first, *answer]
        assert not last.done(), "the others are still there"
        done = left.result()
        details = cluster.dashboard("/api/serve/applications/")["applications"]["manta"]["deployments"]
        for name in ("cpu", "front"):
            end(cluster.pods[name].process)
        assert last.result().returncode == 0
    assert done.returncode == 0, done.stderr
    chunks = [json.loads(line.removeprefix(b"data: ")) for line in lines if line.startswith(b"data: {")]
    assert not any("error" in chunk for chunk in chunks), chunks[-1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert lines[-2] == b"data: [DONE]\n"
    replicas = [replica for deployment in details.values() for replica in deployment["replicas"]]
    assert cluster.pods["cpu"].ip not in [replica.get("node_ip") for replica in replicas], "one that is still to be placed is nowhere"
