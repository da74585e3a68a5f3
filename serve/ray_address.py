"""Which Ray is meant."""

import os
from collections.abc import Mapping

from serve.config import ServeConfig

LOCAL, RUNNING = "local", "auto"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a job that was submitted."""
ADDRESS_VARIABLE = "RAY_ADDRESS"
"""By which Ray's own programs are told a cluster."""


def address_of(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> str:
    """What settings and environment mean: "local", "auto" or host:port."""
    return config.ray.address or (RUNNING if JOB_VARIABLE in environment else LOCAL)


def watched_address(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """What an onlooker means; None: whatever runs here, a server with a Ray of its own before a cluster that this host belongs to."""
    return config.ray.address or (RUNNING if environment.get(ADDRESS_VARIABLE) else None)
