"""The process that holds clients' sockets: it leaves who does not read, and is back at its ports as soon as it was killed."""

import json
import socket
from collections.abc import Iterator

import httpx
import psutil
import pytest

from tests.system.server import Server, eventually, serving
from tests.system.tiny_model import write_tiny

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

LONG = 1900


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    with serving(str(folder), "--name", "tiny", "--dtype", "float32", "--set", "http.slow_client_timeout_s=2") as server:
        yield server


def connections(port: int, far_port: int | None = None) -> list[str]:
    """States of the server's ends at a port, of one client or of all."""
    ends = [one for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == port and one.raddr]
    return [one.status for one in ends if far_port is None or one.raddr.port == far_port]


def test_a_client_that_does_not_read_over_http_is_left(server: Server) -> None:
    body = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": LONG,
        "n": 8,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 5,
        "temperature": 1.0,
    }
    raw = json.dumps(body).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.http_port))
        own_port = client.getsockname()[1]
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(raw) + raw
        )
        assert client.recv(12) == b"HTTP/1.1 200"
        eventually(lambda: "ESTABLISHED" not in connections(server.http_port, own_port), 240)
        client.settimeout(60)
        told = b""
        try:
            while piece := client.recv(1 << 20):
                told += piece
        except ConnectionError:
            pass
    assert b"[DONE]" not in told
    assert httpx.get(f"{server.url}/readyz", timeout=30).status_code == 200


def test_a_killed_proxy_is_back_while_its_old_connections_cool_down(server: Server) -> None:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.get("/readyz").status_code == 200
        (proxy,) = [process for process in server.descendants if process.name().startswith("ray::ProxyActor")]
        proxy.kill()
        psutil.wait_procs([proxy], timeout=20)
    eventually(lambda: _answers(server), 240)
    cooling = {"TIME_WAIT", "FIN_WAIT1", "FIN_WAIT2"}
    if not cooling & set(connections(server.http_port)):
        pytest.skip("nothing cools down any more, so this has shown nothing")


def _answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
