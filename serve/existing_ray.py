"""Deploy the application on an existing Ray cluster, and remove it again."""

import contextlib
import logging
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.serve as ray_serve
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

from cluster.directory import ReplicaRecord, current_records, end_directory, refusals
from cluster.ray_cluster import CannotJoin, join_ray_cluster
from serve.config import ServeConfig
from serve.deployment import FRONT_MARGIN_S, FRONTS, ServedModel
from serve.exposure import EVERY_ADDRESS, is_loopback
from serve.grpc.server import SERVICER_FUNCTIONS
from serve.proxy_hook import variables
from serve.ray_address import address_of
from serve.rollout import OnProgress, ReplicaChangeLog, StartError, as_start_error, deploy, start_proxies
from serve.stop_requests import requests_ending
from serve.stop_signals import StopSignals

UNSENT = [".git", ".venv", "tests", "docs", "k8s", "benchmarks", "**/node_modules", "**/__pycache__"]
DELETE_MARGIN_S = 30.0
LOOK_S = 1.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExistingRayServer:
    """The deployed application."""

    app: str
    config: ServeConfig
    """Settings with the ports that the cluster's proxies actually use."""
    stop: StopSignals

    def records(self) -> tuple[ReplicaRecord, ...]:
        return current_records(self.app)

    def wait(self) -> None:
        """Wait for SIGINT or SIGTERM. Meanwhile log changes of replicas."""
        changes = ReplicaChangeLog()
        while not self.stop.stopped.wait(1.0):
            changes.update(self.records(), refusals(self.app))


@contextmanager
def run_on_existing_ray(
    models: Sequence[ServedModel], config: ServeConfig, *, keep: bool, on_progress: OnProgress
) -> Iterator[ExistingRayServer]:
    """Deploy or update the application. On exit it is removed, unless ``keep``.

    For the main thread only; signals are handled as in `serve.local_ray.run_local`.

    Raises:
        StartError: the cluster cannot be joined, or the application cannot start; the message says why.
        KeyboardInterrupt: stopped during the start.
    """
    address, app, stop = address_of(config), config.ray.app, StopSignals()
    with ExitStack() as stack:
        stack.enter_context(stop.handled())
        on_progress(f"joining the Ray cluster at {address}", 0.0)
        try:
            stack.enter_context(join_ray_cluster(address, namespace=config.ray.namespace, runtime_env=_runtime_env(config)))
        except CannotJoin as error:
            raise StartError(str(error)) from error
        stop.install()  # again: Ray installed its own handlers
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        on_progress("starting Ray Serve", 0.05)
        with as_start_error("starting Ray Serve"):
            start_proxies(config, ProxyLocation.EveryNode)
        has_started = False
        try:
            deploy(models, config, app=app, on_progress=on_progress)
            stop.starting, has_started = False, True
            on_progress("ready", 1.0)
            yield ExistingRayServer(app=app, config=_with_real_ports(config), stop=stop)
        finally:
            stop.starting = False
            if not keep:
                remove(app, stop=stop, has_requests=has_started)


def remove(app: str, *, stop: StopSignals | None = None, has_requests: bool = True) -> bool:
    """Remove an application, and shut Ray Serve down if it was the last one. Returns False if there is none of this name.

    Its requests (if it ``has_requests``) may run for the time with which it was deployed, or until `StopSignals.repeated`; the signal after
    that interrupts this function. Before and after this time, any signal does, unless ``stop`` is installed already. For the main thread
    only.

    Ray Serve gets the order before anything is waited for. So it does not restart what dies meanwhile, and the application ends even if
    this process is killed.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop, has_order = stop or StopSignals(), False
    try:  # every call hangs if Ray Serve's controller does
        client: Any = _get_global_client(raise_if_no_controller_running=False)
        if client is None or app not in ray_serve.status().applications:
            return False
        grace_s = _grace_s(client, app) if has_requests else None
        stop.install()
        with (
            contextlib.nullcontext()
            if grace_s is None
            else requests_ending(app, grace_s=grace_s, hurry=stop.repeated, outlives_process=True)
        ):
            client.delete_apps([app], blocking=False)
            has_order = True
    except KeyboardInterrupt:
        if not has_order:
            logger.error("Ray Serve has not confirmed the order to remove %s: it may still be there, and refuse requests", app)
        raise
    stop.restore()
    deadline = time.monotonic() + (0.0 if stop.repeated.is_set() else grace_s or 0.0) + DELETE_MARGIN_S
    while app in (left := ray_serve.status().applications) and time.monotonic() < deadline:
        time.sleep(0.2)
    end_directory(app)
    if not left:
        ray_serve.shutdown()
    return True


def _grace_s(client: Any, app: str) -> float | None:
    """How long the requests of a deployed application may go on, by its fronts' deployment; None if it has none."""
    fronts = client.get_serve_details()["applications"].get(app, {}).get("deployments", {}).get(FRONTS)
    return None if fronts is None else max(0.0, float(fronts["deployment_config"]["graceful_shutdown_timeout_s"]) - FRONT_MARGIN_S)


def _runtime_env(config: ServeConfig) -> dict[str, Any]:
    """Runtime environment of this driver. Ray Serve's proxies inherit it if this driver starts them."""
    env: dict[str, Any] = {
        "env_vars": dict(
            variables(grpc_host=config.grpc.host, tls=config.grpc.tls, slow_client_timeout_s=config.http.slow_client_timeout_s)
        )
    }
    if config.ray.send_code:
        env |= {"working_dir": str(Path(__file__).parent.parent), "excludes": UNSENT}
    return env


def _with_real_ports(config: ServeConfig) -> ServeConfig:
    """The settings with the addresses of the running proxies, which were chosen by whoever started Ray Serve."""
    details: Mapping[str, Any] = _get_global_client().get_serve_details()  # type: ignore[union-attr]
    http, grpc = details["http_options"], details["grpc_options"]
    if SERVICER_FUNCTIONS[0] not in (grpc or {}).get("grpc_servicer_functions", ()):
        logger.warning("Ray Serve was started without Manta's gRPC services: only HTTP answers (`manta config --emit serve` has them)")
    host = http["host"] or EVERY_ADDRESS[0]
    sections: dict[str, Any] = {"http": config.http.model_copy(update={"host": host, "port": http["port"]})}
    with contextlib.suppress(TypeError, KeyError):
        open_to_all = _takes_connections(
            ray.util.get_node_ip_address(), grpc["port"]
        )  # proxies without our hook listen on all addresses, whatever the settings say
        sections["grpc"] = config.grpc.model_copy(
            update={"port": grpc["port"], **({"host": EVERY_ADDRESS[0]} if open_to_all and is_loopback(config.grpc.host) else {})}
        )
    return config.model_copy(update=sections)


def _takes_connections(host: str, port: int) -> bool:
    """Whether a process listens on the port at a non-loopback address."""
    if is_loopback(host):
        return False
    with contextlib.suppress(OSError), socket.create_connection((host, port), LOOK_S):
        return True
    return False
