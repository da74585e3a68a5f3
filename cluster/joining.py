"""A Ray cluster that runs already, joined as a driver."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray


class CannotJoin(RuntimeError):
    """There is no Ray cluster at this address, or it does not let us in."""


@contextmanager
def joined(address: str, *, namespace: str, runtime_env: Mapping[str, Any] | None = None) -> Iterator[None]:
    """For the length of a block; what was made detached stays. ``runtime_env`` holds for all actors made in it.

    Raises:
        CannotJoin: with what Ray said.
    """
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
