"""A Ray cluster that runs already, joined as a driver."""

import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address

LISTENS_S = 3.0
"""How long a head may take to take a connection. Ray tries for minutes."""


class CannotJoin(RuntimeError):
    """There is no Ray cluster at this address, or it does not let us in."""


@contextmanager
def joined(address: str, *, namespace: str, runtime_env: Mapping[str, Any] | None = None) -> Iterator[None]:
    """For the length of a block; what was made detached stays. ``runtime_env`` holds for all actors made in it.

    Raises:
        CannotJoin: with what Ray said, or because the head takes no connection.
    """
    _must_listen(address)
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


def _must_listen(address: str) -> None:
    """Whether there is a head at all. Where Ray cannot say which one is meant it says so itself, and at once."""
    try:
        meant = canonicalize_bootstrap_address(address)
    except Exception:  # Ray raises many kinds
        return
    if meant is None or "://" in meant:
        return
    host, _, port = meant.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LISTENS_S).close()
    except OSError as error:
        raise CannotJoin(
            f"the Ray cluster at {address} could not be joined: its head takes no connection at {meant} ({error}); "
            "while it is away other hosts go on serving"
        ) from error
