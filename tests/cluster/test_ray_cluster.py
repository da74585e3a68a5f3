"""A head that is not there is told at once."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from ray._private.services import canonicalize_bootstrap_address

from cluster.ray_cluster import CannotJoin, join_ray_cluster


def test_a_head_that_takes_no_connection_is_not_waited_for() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # bound, and nobody listens
        with (
            pytest.raises(CannotJoin, match=f"{address} could not be joined: its head takes no connection at .*refused"),
            join_ray_cluster(address, namespace="manta"),
        ):
            pass


class WantsAToken(grpc.GenericRpcHandler):
    """Answers every call as the head of a cluster that has another token."""

    def service(self, _call: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            lambda _request, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: missing or incorrect")
        )


@pytest.fixture
def head_of_others(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    server = grpc.server(ThreadPoolExecutor(1), handlers=(WantsAToken(),))
    host = str(canonicalize_bootstrap_address("127.0.0.1:1")).rpartition(":")[0]  # Ray means the network by it
    port = server.add_insecure_port(f"{host}:0")
    server.start()
    yield f"{host}:{port}"
    server.stop(None)


def test_a_head_that_wants_another_token_is_asked_once(head_of_others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ray_cluster.ray.init", None)  # Ray itself is not troubled
    with pytest.raises(CannotJoin, match="wants another token than this process has"), join_ray_cluster(head_of_others, namespace="manta"):
        pass
