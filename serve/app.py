"""The application for Ray Serve's config files: ``import_path: serve.app:app``, with its settings in ``args``.

The args have the structure of a settings file (`manta config`). `manta config --emit serve` writes the whole config file for
`serve deploy`, or for the serveConfigV2 of a RayService.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray.serve as ray_serve

from serve.config import ServeConfig
from serve.config_sources import from_tree, load, merge_entries
from serve.deployment import ServedModel, build_app
from serve.model_source import check_unique_names, portable_adapter, portable_source, served_name
from serve.ray_serve_config import CLUSTER_SETTINGS

FILE_VARIABLE = "MANTA_CONFIG"
"""The path of the settings file for `from_environment`."""

logger = logging.getLogger(__name__)


def app(args: dict[str, Any]) -> ray_serve.Application:
    """Called by Ray Serve. ``args``: sections of settings, or ``section.field`` (``serve run serve.app:app parallel.tensor=2``).

    Raises:
        ConfigError: a setting is wrong, with the message that `manta serve` would show.
    """
    loaded = merge_entries(from_tree(args, "args"))
    for path in sorted(CLUSTER_SETTINGS & loaded.origins.keys()):
        logger.warning("%s has no effect here: proxies are set up by the Serve config file, Ray by whoever started it", path)
    return application(loaded.config)


def application(config: ServeConfig) -> ray_serve.Application:
    """The application on a cluster, where every host locates the models itself."""
    models = [
        ServedModel(location=portable_source(one.model), adapter=portable_adapter(one.model), name=served_name(one.model), config=one)
        for one in config.each_model()
    ]
    check_unique_names([model.name for model in models])
    return build_app(models, config)


def __getattr__(name: str) -> ray_serve.Application:
    """``serve.app:from_environment``, for tools that take an application object and no args (`serve build`).

    Its settings come from ``MANTA_<SECTION>__<FIELD>`` and from the file named by ``MANTA_CONFIG``.
    """
    if name != "from_environment":
        raise AttributeError(name)
    return application(_settings(os.environ))


def _settings(environment: Mapping[str, str]) -> ServeConfig:
    file = environment.get(FILE_VARIABLE)
    return load(file=Path(file) if file else None, environment=environment).config
