"""A Ray cluster that runs already, joined as a driver."""

import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.gcs_utils import create_gcs_channel
from ray._private.services import canonicalize_bootstrap_address

LISTENS_S = 3.0
"""How long a head may take to take a connection. Ray tries for minutes."""

FIRST_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""What whoever joins asks the head first; it has no fields."""


class CannotJoin(RuntimeError):
    """There is no Ray cluster at this address, or it does not let us in."""


@contextmanager
def join_ray_cluster(address: str, *, namespace: str, runtime_env: Mapping[str, Any] | None = None) -> Iterator[None]:
    """For the length of a block; what was made detached stays. ``runtime_env`` holds for all actors made in it.

    Raises:
        CannotJoin: with what Ray said, or because the head takes no connection, or not with this token.
    """
    if (head := _head_of(address)) is not None:
        _must_listen(address, head)
        _must_let_in(address, head)
    try:
        ray.init(
            address=address,
            namespace=namespace,
            runtime_env=dict(runtime_env or {}),
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises many kinds
        raise CannotJoin(f"the Ray cluster at {address} could not be joined: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def hosts() -> list[Mapping[str, float]]:
    """Ray's resources of each living host of the Ray that was started or joined, in use or not."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _head_of(address: str) -> str | None:
    """host:port. None where Ray cannot say which one is meant: it says so itself, and at once."""
    try:
        meant: str | None = canonicalize_bootstrap_address(address)
    except Exception:  # Ray raises many kinds
        return None
    return None if meant is None or "://" in meant else meant


def _must_listen(address: str, head: str) -> None:
    """Whether there is a head at all."""
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LISTENS_S).close()
    except OSError as error:
        raise CannotJoin(
            f"the Ray cluster at {address} could not be joined: its head takes no connection at {head} ({error}); "
            "while it is away other hosts go on serving"
        ) from error


def _must_let_in(address: str, head: str) -> None:
    """Whether the head takes this process's token, or none. Ray asks for twenty seconds, and does not say that it was this."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as `ray.init` is about to
    with create_gcs_channel(head) as channel:
        try:
            channel.unary_unary(FIRST_QUESTION)(b"", timeout=LISTENS_S)
        except Exception as error:  # of gRPC; whatever else it is Ray shall find and say
            if getattr(getattr(error, "code", lambda: None)(), "name", "") == "UNAUTHENTICATED":
                raise CannotJoin(
                    f"the Ray cluster at {address} could not be joined: its head at {head} wants another token than this process has, or "
                    "one at all; RAY_AUTH_MODE=token with RAY_AUTH_TOKEN_PATH=FILE says which"
                ) from None
