"""The server's stubs and the client's in one process, as `manta chat` has them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROUND_TRIP = """
import importlib, pickle, sys
first, second = (importlib.import_module(f"{package}.service_pb2") for package in sys.argv[1:])
written = first.ChatRequest(model="m", messages=[{"role": 2, "content": "Hi"}]).SerializeToString()
assert second.ChatRequest.FromString(written).messages[0].content == "Hi"
assert pickle.loads(pickle.dumps(second.ChatRequest(model="m"))).model == "m"
"""


@pytest.mark.parametrize("first", ["serve.grpc.generated", "manta_client._generated"])
def test_both_copies_live_in_one_process(first: str) -> None:
    (second,) = {"serve.grpc.generated", "manta_client._generated"} - {first}
    command = [sys.executable, "-c", ROUND_TRIP, first, second]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert result.returncode == 0, result.stderr


def test_messages_are_pickled_under_the_servers_own_name() -> None:
    """Ray Serve pickles requests between processes that have no client installed."""
    show = "from serve.grpc.generated import service_pb2; print(service_pb2.ChatRequest.__module__)"
    command = [sys.executable, "-c", show]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert result.stdout.strip() == "serve.grpc.generated.service_pb2"
