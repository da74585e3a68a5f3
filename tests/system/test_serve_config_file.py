"""An application from a Serve config file, on a Ray that somebody else has started."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from manta_client import Client

from tests.system.ray_host import RayHost, ray_head
from tests.system.server import eventually, free_ports

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def head(demo_folder: Path) -> Iterator[RayHost]:
    with ray_head() as host:
        yield host


def test_a_config_file_that_manta_wrote_is_deployed_and_answers_and_a_wrong_one_says_why(head: RayHost, tmp_path: Path) -> None:
    http, grpc = free_ports(2)
    settings = [f"http.port={http}", f"grpc.port={grpc}", "runner.dtype=float32", "parallel.tensor=2", "model.name=talker"]
    command = ["manta", "config", "--emit", "serve", *(word for setting in settings for word in ("--set", setting))]
    text = head.run(*command).stdout
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    head.run("serve", "deploy", str(file), "-a", head.dashboard)
    eventually(lambda: ready(http), 240)

    asked = {"model": "talker", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    answer = httpx.post(f"http://127.0.0.1:{http}/v1/chat/completions", json={**asked, "max_tokens": 32}, timeout=120).json()
    said = answer["choices"][0]["message"]["content"]
    assert "Paris" in said
    with Client(f"grpc://127.0.0.1:{grpc}", timeout=120) as client:
        assert client.chat.create(**asked, max_tokens=32).text == said

    wrong = yaml.safe_load(text)
    wrong["applications"][0]["args"]["parallel"]["tensor"] = 0
    wrong["applications"][0]["args"]["engin"] = {"max_running": 3}
    file.write_text(yaml.safe_dump(wrong))
    head.run("serve", "deploy", str(file), "-a", head.dashboard)
    told = eventually(lambda: failure(head), 120)
    assert "unknown setting engin.max_running (args.engin.max_running); did you mean engine.max_running?" in told
    assert "parallel: tp must be at least 1, got 0 (args.parallel.tensor)" in told
    assert ready(http), "what was deployed before serves on"


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def failure(head: RayHost) -> str:
    """What Ray Serve says of an application that could not be deployed; empty while it has not tried."""
    application = yaml.safe_load(head.run("serve", "status", "-a", head.dashboard).stdout)["applications"]["manta"]
    return str(application["message"]) if application["status"] == "DEPLOY_FAILED" else ""
