"""Which Ray is meant."""

import os
from collections.abc import Mapping

from serve.config import ServeConfig

LOCAL, RUNNING = "local", "auto"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a job that was submitted."""


def address_of(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> str:
    """What settings and environment mean: "local", "auto" or host:port."""
    return config.ray.address or (RUNNING if JOB_VARIABLE in environment else LOCAL)
