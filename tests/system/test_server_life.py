"""The end of `manta serve`: by signals, with running requests, or killed without a chance to clean up."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from manta_client import Client, Unavailable

from tests.system.server import eventually, serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def test_what_a_killed_server_had_started_ends_as_well(demo_folder: Path) -> None:
    with serving(str(demo_folder), "--name", "demo", "--tensor-parallel", "2") as server:
        family = server.descendants
        assert len(server.ranks()) == 2
        server.process.kill()
        server.process.wait(5)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive


def test_running_streams_may_finish_when_it_is_stopped_and_else_end_with_an_error(demo_folder: Path) -> None:
    """The first Ctrl-C begins a grace, which the second one ends."""
    url = ""

    def stream(max_tokens: int) -> list[str]:
        body = {"model": "demo", "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as answer:
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line]  # raises where the connection breaks

    def call() -> str:
        with Client(server.grpc, max_retries=0) as client, pytest.raises(Unavailable) as caught:
            client.completions.stream(prompt="Once", max_tokens=7000, ignore_eos=True).final()
        return caught.value.reason or ""

    grace = ("--set", "replica.drain_timeout_s=300")  # longer than the short stream takes on any machine
    with ThreadPoolExecutor(4) as clients, serving(str(demo_folder), "--name", "demo", *grace) as server:
        url = server.url
        assert stream(5)[-1] == "[DONE]"
        longer = [clients.submit(stream, 7000), clients.submit(call)]
        short = clients.submit(stream, 200)
        eventually(lambda: _sum_of("manta_requests_in_progress", url) == 3, 30)
        assert (_sum_of("manta_front_ready", url), _sum_of("manta_front_draining", url)) == (1, 0)
        family = server.descendants
        for _ in range(2):  # as where a wrapper passes on what the terminal has sent to all processes: it counts as one
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert short.result(200)[-1] == "[DONE]"
        assert not any(each.done() for each in longer)
        assert httpx.get(f"{url}/readyz").status_code == 503
        assert httpx.post(f"{url}/v1/completions", json={"model": "demo", "prompt": "Once"}).status_code == 503
        assert _sum_of("manta_request_failures_total", url, 'code="draining"') == 1
        assert (_sum_of("manta_front_ready", url), _sum_of("manta_front_draining", url)) == (0, 1)
        server.process.send_signal(signal.SIGINT)
        assert json.loads(longer[0].result(30)[-1])["error"]["code"] == "draining"
        assert longer[1].result(30) == "draining"
        assert server.process.wait(30) == 0
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
        assert any("3 requests are still running and may finish within 300 s" in line for line in server.lines)
        assert "Traceback" not in "\n".join(server.lines)


def _sum_of(metric: str, url: str, label: str = "") -> int:
    """The sum of a metric's series with ``label``, over all fronts."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric + "{") and label in line))
