"""Manta on a Ray cluster that somebody else has started: as a job, and by `manta up`, `status` and `down`."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from manta_client import Client

from tests.processes import name_of
from tests.system.ray_host import ROOT, RayHost, ray_head
from tests.system.server import eventually, free_ports

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

ASKED = {"model": "demo", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 32}
MANTA = (sys.executable, "-m", "serve")
DRAINING = """
import os, ray, ray.serve
from serve.deployment import APP, FRONTS
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
ray.serve.get_deployment_handle(FRONTS, APP).broadcast("drain").results(timeout_s=30)
"""


@pytest.fixture(scope="module")
def bare_head(demo_folder: Path) -> Iterator[RayHost]:
    """Its processes know nothing of Manta."""
    with ray_head(importable=False) as host:
        yield host


def settings(*given: str) -> list[str]:
    return [word for setting in given for word in ("--set", setting)]


def answer(port: int) -> str:
    return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=ASKED, timeout=120).json()["choices"][0]["message"]["content"]


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_submitted_job_serves_and_a_stopped_one_leaves_nothing(bare_head: RayHost, demo_folder: Path, tmp_path: Path) -> None:
    http, grpc = free_ports(2)
    code = tmp_path / "checkout"
    code.mkdir()
    for package in ("parallel", "model", "engine", "cluster", "serve"):
        (code / package).symlink_to(ROOT / package)
    command = [*("--", "python", "-m", "serve", "serve", str(demo_folder), "--name", "demo", "--dtype", "float32", "-t", "2")]
    ports = ["--http-port", str(http), "--grpc-port", str(grpc)]
    submit = ("ray", "job", "submit", "--no-wait", "--address", bare_head.dashboard, "--working-dir", str(code))
    told = bare_head.run(*submit, *command, *ports, cwd=tmp_path).stdout
    job = re.search(r"raysubmit_\w+", told)
    assert job, told

    def status() -> str:
        return bare_head.run("ray", "job", "status", "--address", bare_head.dashboard, job[0]).stdout

    def logs() -> str:
        return bare_head.run("ray", "job", "logs", "--address", bare_head.dashboard, job[0]).stdout

    eventually(lambda: ready(http) or "failed" in status().lower(), 300)
    assert ready(http), logs()
    assert "Paris" in answer(http)
    with Client(f"grpc://127.0.0.1:{grpc}", timeout=120) as client:
        assert client.chat.create(**ASKED).text == answer(http)
    eventually(lambda: "Manta serves demo: 1 replica of 2 ranks" in logs(), 60)
    bare_head.run("ray", "job", "stop", "--address", bare_head.dashboard, job[0])
    eventually(lambda: not _has(bare_head, "EngineDeployment", "Worker"), 60)


def _has(host: RayHost, *parts: str) -> bool:
    """Whether a process of the host has one of ``parts`` in its name."""
    return any(part in name_of(process) for process in host.descendants for part in parts)


def test_up_status_up_again_and_down(demo_folder: Path) -> None:
    http, grpc = free_ports(2)
    given = settings(f"http.port={http}", f"grpc.port={grpc}", "runner.dtype=float32", "model.name=demo")
    with ray_head(num_cpus=6, dashboard=False) as head:
        told = head.run(*MANTA, "up", str(demo_folder), "-t", "2", *given, timeout_s=400).stdout
        assert f"http://127.0.0.1:{http}/v1" in told
        said = answer(http)
        assert "Paris" in said

        seen = json.loads(head.run(*MANTA, "status", "--json").stdout)
        (replica,) = seen["replicas"]
        assert (replica["model"], replica["state"], [place["rank"] for place in replica["ranks"]]) == ("demo", "ready", [0, 1])
        assert "demo" in head.run(*MANTA, "status").stdout

        head.run(*MANTA, "up", str(demo_folder), "-t", "1", "-r", "2", *given, timeout_s=400)
        eventually(lambda: len(json.loads(head.run(*MANTA, "status", "--json").stdout)["replicas"]) == 2, 60)
        assert answer(http) == said

        assert "has ended" in head.run(*MANTA, "down").stdout
        assert not ready(http)
        refused = head.run(*MANTA, "down", check=False)
        assert refused.returncode == 1
        assert "the cluster has no application 'manta'" in refused.stderr
        eventually(lambda: not _has(head, "EngineDeployment"), 60)


def test_an_application_whose_removal_was_killed_before_its_order_is_replaced_by_the_same(demo_folder: Path) -> None:
    http, grpc = free_ports(2)
    up = (*MANTA, "up", str(demo_folder), *settings(f"http.port={http}", f"grpc.port={grpc}", "model.name=demo"))
    with ray_head(dashboard=False) as head:
        head.run(*up, timeout_s=400)
        head.run(sys.executable, "-c", DRAINING)
        eventually(lambda: not ready(http), 30)
        head.run(*up, timeout_s=400)
        eventually(lambda: ready(http), 30)
        assert "Paris" in answer(http)


def test_streams_of_a_removed_application_end_in_order_even_if_its_removal_is_killed(demo_folder: Path) -> None:
    http, grpc = free_ports(2)
    given = settings(f"http.port={http}", f"grpc.port={grpc}", "model.name=demo")

    def stream(max_tokens: int) -> list[str]:
        body = {"model": "demo", "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{http}/v1/completions", json=body, timeout=120) as answer:
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line]  # raises where the connection breaks

    def removal() -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([*MANTA, "down"], env=dict(head.environment), cwd=ROOT)
        eventually(lambda: httpx.get(f"http://127.0.0.1:{http}/readyz").status_code == 404, 60)  # Ray Serve has the order
        return process

    with ray_head(num_cpus=6, dashboard=False) as head, ThreadPoolExecutor(1) as client:
        for grace_s, number in ((6, signal.SIGKILL), (300, signal.SIGINT)):
            head.run(*MANTA, "up", str(demo_folder), *given, *settings(f"replica.drain_timeout_s={grace_s}"), timeout_s=400)
            assert stream(5)[-1] == "[DONE]"
            running = client.submit(stream, 7000)
            eventually(lambda: _num_in_progress(http) == 1, 30)
            process = removal()
            process.send_signal(number)
            assert json.loads(running.result(60)[-1])["error"]["code"] == "draining"
            eventually(lambda: not _has(head, "EngineDeployment"), 60)
            process.wait(60)


def test_a_cluster_does_not_let_in_who_has_another_token(bare_head: RayHost, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    (tmp_path / "token").chmod(0o600)
    outsider = {**bare_head.environment, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    refused = RayHost(bare_head.process, bare_head.address, bare_head.dashboard, outsider, bare_head.folder).run(
        *MANTA, "up", "demo", "--ray-address", bare_head.address, check=False
    )
    assert refused.returncode == 1
    assert f"the Ray cluster at {bare_head.address} could not be joined" in refused.stderr
    assert "Traceback" not in refused.stderr


def _num_in_progress(port: int) -> int:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").text.splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("manta_requests_in_progress")))
