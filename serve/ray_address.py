"""Which Ray the settings and the environment refer to."""

import os
from collections.abc import Mapping

from serve.config import ServeConfig

LOCAL, RUNNING = "local", "auto"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a submitted job."""
ADDRESS_VARIABLE = "RAY_ADDRESS"
"""Ray's own variable for the address of a cluster."""


def address_of(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> str:
    """The Ray to serve on: "local", "auto" or host:port."""
    return config.ray.address or (RUNNING if JOB_VARIABLE in environment else LOCAL)


def watched_address(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> str | None:
    """The Ray to observe (`manta status`); None: whatever runs here, preferring a server with a private Ray to this host's cluster."""
    return config.ray.address or (RUNNING if environment.get(ADDRESS_VARIABLE) else None)
