"""Convert settings to a Ray Serve config file, for `serve deploy` and a RayService's serveConfigV2."""

from typing import Any

import yaml

from serve.config_sources import LoadedConfig, known_settings
from serve.grpc.server import SERVICER_FUNCTIONS
from serve.proxy_hook import variables

IMPORT_PATH = "serve.app:app"
FRONT_SETTINGS = frozenset({"http.strict", "http.allowed_origins"})
CLUSTER_SETTINGS = frozenset(path for path in known_settings() if path.startswith(("http.", "grpc.", "ray."))) - FRONT_SETTINGS
"""Settings of the proxies and of Ray, which exist before the application: they are not among its args."""

HEAD = """\
# For `serve deploy` (Ray Serve), or a RayService's serveConfigV2. Written by `manta config --emit serve`.
# Manta must be importable on every host (PYTHONPATH or an image), and its dependencies installed.
# Every host's Ray must have been started with these in its environment; without them gRPC listens on every address:
"""


def ray_serve_config_yaml(loaded: LoadedConfig, *, name: str) -> str:
    """The config file as YAML. ``name``: application name. The args hold only the model and the settings that differ from the default."""
    grpc = loaded.config.grpc
    wanted = variables(grpc_host=grpc.host, tls=grpc.tls, slow_client_timeout_s=loaded.config.http.slow_client_timeout_s)
    environment = "".join(f"#   {key}={value}\n" for key, value in wanted.items())
    return HEAD + environment + yaml.safe_dump(ray_serve_config(loaded, name=name), sort_keys=False, width=110)


def ray_serve_config(loaded: LoadedConfig, *, name: str) -> dict[str, Any]:
    """The config file as a tree (`ray.serve.schema.ServeDeploySchema`)."""
    config = loaded.config
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.http.host, "port": config.http.port},
        "grpc_options": {
            "port": config.grpc.port,
            "grpc_servicer_functions": list(SERVICER_FUNCTIONS),
            "enable_reflection": config.grpc.reflection,
        },
        "logging_config": {"log_level": config.logging.level.upper(), "enable_access_log": False},
        "applications": [{"name": name, "route_prefix": "/", "import_path": IMPORT_PATH, "args": _args(loaded)}],
    }


def _args(loaded: LoadedConfig) -> dict[str, Any]:
    values = loaded.config.model_dump(mode="json")
    args: dict[str, Any] = {}
    models: list[dict[str, Any]] = [{} for _ in loaded.config.models]
    for path in (
        sorted(loaded.origins.keys() - CLUSTER_SETTINGS) if models else sorted({"model.source", *loaded.origins} - CLUSTER_SETTINGS)
    ):
        *place, section, field = path.split(".")
        source, target = (values["models"][int(place[1])], models[int(place[1])]) if place else (values, args)
        target.setdefault(section, {})[field] = source[section][field]
    return args | ({"models": models} if models else {})
