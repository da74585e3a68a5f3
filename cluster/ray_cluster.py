"""Join an existing Ray cluster as a driver."""

import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import canonicalize_bootstrap_address

CONNECT_S = 3.0
"""Timeout for the connection to the head; Ray itself tries for minutes."""

FIRST_RPC = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""The first RPC of a process that joins; its request has no fields."""


class CannotJoin(RuntimeError):
    """There is no Ray cluster at this address, or it refused this process."""


@contextmanager
def join_ray_cluster(address: str, *, namespace: str, runtime_env: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Join the cluster for the length of the block; detached actors stay. ``runtime_env`` applies to all actors created in it.

    Raises:
        CannotJoin: Ray failed to join, or the head accepts no connection, or not with this token.
    """
    if (head := _head_address(address)) is not None:
        _check_connection(address, head)
        _check_token(address, head)
    try:
        ray.init(
            address=address,
            namespace=namespace,
            runtime_env=dict(runtime_env or {}),
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises many types
        raise CannotJoin(f"the Ray cluster at {address} could not be joined: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def host_resources() -> list[Mapping[str, float]]:
    """Ray's total resources of each living host of the current cluster."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _head_address(address: str) -> str | None:
    """host:port of the head. None if Ray cannot resolve ``address``; `ray.init` then fails at once with its own message."""
    try:
        resolved: str | None = canonicalize_bootstrap_address(address)
    except Exception:  # Ray raises many types
        return None
    return None if resolved is None or "://" in resolved else resolved


def _check_connection(address: str, head: str) -> None:
    """Raise CannotJoin if the head accepts no connection."""
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise CannotJoin(
            f"the Ray cluster at {address} could not be joined: its head takes no connection at {head} ({error}); "
            "while it is away other hosts go on serving"
        ) from error


def _check_token(address: str, head: str) -> None:
    """Raise CannotJoin if the head refuses this process's token. Ray itself tries for 20 s, and its error does not name the token."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init` is about to
    with create_gcs_channel(head) as channel:
        try:
            channel.unary_unary(FIRST_RPC)(b"", timeout=CONNECT_S)
        except Exception as error:  # gRPC's; any other problem is left for Ray to report
            if getattr(getattr(error, "code", lambda: None)(), "name", "") == "UNAUTHENTICATED":
                raise CannotJoin(
                    f"the Ray cluster at {address} could not be joined: its head at {head} wants another token than this process has, or "
                    "one at all; RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH=FILE says which"
                ) from None
