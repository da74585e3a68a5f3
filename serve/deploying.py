"""An application brought up on a Ray that runs: Ray Serve's proxies, the deployments, how far they are, and what befalls them later.

Whose Ray it is does not matter here; see `serve.local_ray` and `serve.joined_ray`.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray.serve as ray_serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from cluster.directory import ReplicaRecord, current_records
from serve.config import ServeConfig
from serve.deployment import Model, build_app
from serve.grpc.server import SERVICER_FUNCTIONS

LOADING_SPAN = (0.15, 0.95)
"""Which part of the start loading the weights is."""

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]
"""Told what is being done and how much of the start is done, from 0 to 1."""


class StartError(RuntimeError):
    """The server could not be started, or its Ray died; the message says why."""


@contextmanager
def told_as_start_error(doing: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, ValueError, TimeoutError) as error:
        raise StartError(f"{doing} failed: {error}") from error


def start_proxies(config: ServeConfig, location: ProxyLocation) -> None:
    """Without effect where Ray Serve runs already."""
    ray_serve.start(
        proxy_location=location,
        http_options=HTTPOptions(host=config.http.host, port=config.http.port),
        grpc_options=gRPCOptions(
            port=config.grpc.port,
            grpc_servicer_functions=list(SERVICER_FUNCTIONS),
            enable_reflection=config.grpc.reflection,
        ),
    )


def deploy(models: Sequence[Model], config: ServeConfig, *, app: str, on_progress: OnProgress) -> None:
    """Deploy, or bring what is deployed up to date, and wait until it runs.

    Raises:
        StartError: with what Ray Serve knows of the deployments that did not start.
    """
    with _loading_shown(app, on_progress):
        try:
            ray_serve.run(build_app(models, config), name=app, route_prefix="/")
        except RuntimeError as error:
            raise StartError(_why(app, error)) from error


def _why(app: str, error: RuntimeError) -> str:
    try:
        deployments = ray_serve.status().applications[app].deployments.values()
        return "\n".join(deployment.message for deployment in deployments if deployment.message) or str(error)
    except Exception:
        return str(error)


@contextmanager
def _loading_shown(app: str, on_progress: OnProgress) -> Iterator[None]:
    """Tell how far the slowest replica is, from a thread beside."""
    done = threading.Event()
    begin, end = LOADING_SPAN

    def follow() -> None:
        told = None
        while not done.wait(0.3):
            loading = [record.loading for record in current_records(app) if record.loading is not None]
            slowest = min(loading, key=lambda each: each.done, default=None)
            if slowest is not None and slowest != told:
                told = slowest
                on_progress(slowest.doing, begin + (end - begin) * slowest.done)

    thread = threading.Thread(target=follow, name="loading-progress", daemon=True)
    on_progress("starting the replicas", 0.1)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(2)


class ChangeLog:
    """Logs what befalls replicas, each thing once."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str | None, bool]] = {}

    def tell(self, records: Sequence[ReplicaRecord]) -> None:
        for record in records:
            last_loss, ready = self._told.get(record.id, (None, True))
            if record.last_loss is not None and record.last_loss != last_loss:
                logger.error("replica %s: %s", record.id, record.last_loss)
            if record.ready != ready:
                logger.warning("replica %s is %s", record.id, "ready again" if record.ready else f"not ready: {record.reason}")
            self._told[record.id] = (record.last_loss, record.ready)
