"""Replicas come and go by themselves, ranks and all, and no request is lost over it: 0 -> 1 -> 2 -> 1 -> 0."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.system.server import Server, eventually, serving
from tests.system.tiny_model import write_tiny

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = """
model: {{source: {folder}, name: tiny}}
parallel: {{tensor: 2}}
runner: {{dtype: float32, num_threads: 1, kv_cache_bytes: 4000000}}
engine: {{max_running: 8}}
replicas: {{min: 0, max: 2}}
autoscaling: {{scale_down_after_s: 5, scale_to_zero_after_s: 5, ttft_target_s: 5}}
"""
WAIT_S = 240.0
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("scaling")
    file = place / "manta.yaml"
    file.write_text(SETTINGS.format(folder=write_tiny(place / "tiny")))
    with serving("-c", str(file)) as server:
        yield server


def complete(server: Server, max_tokens: int, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0} | more
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT_S)


def streamed(server: Server, max_tokens: int) -> tuple[int, bool]:
    """Tokens that came, and whether the stream came to its end."""
    body = {"model": "tiny", "prompt": "Once", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body | USAGE, timeout=WAIT_S) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert answer.status_code == 200
    usage = json.loads(lines[-2])["usage"] if lines[-1] == "[DONE]" else {"completion_tokens": -1}
    return usage["completion_tokens"], lines[-1] == "[DONE]"


def test_from_zero_to_two_and_back_without_losing_a_request(server: Server) -> None:
    assert not server.ranks()
    assert httpx.get(f"{server.url}/readyz").status_code == 200  # whoever asks will be answered

    first = complete(server, 8)
    assert first.status_code == 200
    assert int(first.headers["x-manta-held-ms"]) > 500
    assert len(server.ranks()) == 2

    again = complete(server, 8)
    assert "x-manta-held-ms" not in again.headers
    assert again.json()["choices"] == first.json()["choices"]

    with ThreadPoolExecutor(40) as clients:
        streams: list[Future[tuple[int, bool]]] = []
        until = time.monotonic() + WAIT_S
        while len(server.ranks()) < 4 and time.monotonic() < until:  # more than one replica has room for
            streams = [stream for stream in streams if not stream.done() or stream.result() == (200, True)]
            streams += [clients.submit(streamed, server, 200) for _ in range(24 - sum(not stream.done() for stream in streams))]
            time.sleep(0.5)
        assert len(server.ranks()) == 4
        assert [stream.result() for stream in streams] == [(200, True)] * len(streams)

        few = [clients.submit(streamed, server, 1500) for _ in range(2)]  # both replicas have one when the second is given up
        eventually(lambda: len(server.ranks()) == 2 or None, WAIT_S)
        while len(server.ranks()) == 2 and not all(stream.done() for stream in few):
            time.sleep(0.5)
        assert [stream.result() for stream in few] == [(1500, True)] * 2

    eventually(lambda: not server.ranks() or None, WAIT_S)
    assert complete(server, 8).json()["choices"] == first.json()["choices"]


def test_a_client_that_leaves_while_it_waits_leaves_nothing_behind(server: Server) -> None:
    eventually(lambda: not server.ranks() or None, WAIT_S)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a"}, timeout=0.3)
    assert complete(server, 4).status_code == 200
    page = httpx.get(f"{server.url}/metrics").text
    in_progress = [line for line in page.splitlines() if line.startswith("manta_requests_in_progress{")]
    assert all(line.endswith(" 0.0") for line in in_progress)
