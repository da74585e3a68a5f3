"""An application brought up on a Ray that runs: Ray Serve's proxies, the deployments, how far they are, and what befalls them later.

Whose Ray it is does not matter here; see `serve.local_ray` and `serve.existing_ray`.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import ray.serve as ray_serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import ApplicationStatus

from cluster.directory import Refusal, ReplicaRecord, current_records, refusals
from serve.config import ServeConfig
from serve.deployment import ServedModel, build_app
from serve.devices import DeviceError
from serve.grpc.server import SERVICER_FUNCTIONS

LOADING_SPAN = (0.15, 0.95)
"""Which part of the start loading the weights is."""
POLL_S = 0.3

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]
"""Told what is being done and how much of the start is done, from 0 to 1."""


class StartError(RuntimeError):
    """The server could not be started, or its Ray died; the message says why."""


@contextmanager
def as_start_error(doing: str) -> Iterator[None]:
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


def deploy(models: Sequence[ServedModel], config: ServeConfig, *, app: str, on_progress: OnProgress) -> None:
    """Deploy, or bring what is deployed up to date, and wait until it runs, telling how far the slowest replica is.

    Raises:
        StartError: with what a replica found its hosts unfit for, as soon as one did (Ray Serve would go on trying, for ever where
            other replicas have started), or with what Ray Serve knows of the deployments that did not start.
    """
    on_progress("starting the replicas", LOADING_SPAN[0])
    version = secrets.token_hex(4)
    try:
        target = ray_serve.RunTarget(build_app(models, config, version=version), name=app, route_prefix="/")
        ray_serve.run_many([target], wait_for_applications_running=False)
    except DeviceError as error:
        raise StartError(str(error)) from error
    except RuntimeError as error:
        raise StartError(_why(app, str(error))) from error
    told = None
    while (status := _status(app)) is not ApplicationStatus.RUNNING:
        if refused := {refusal.why for refusal in refusals(app).values() if refusal.version == version}:
            raise StartError("\n".join(sorted(refused)))
        if status is ApplicationStatus.DEPLOY_FAILED:
            raise StartError(_why(app, f"Ray Serve could not deploy {app}"))
        if (slowest := _slowest(app)) not in (None, told):
            told = slowest
            on_progress(*slowest)
        time.sleep(POLL_S)


def _status(app: str) -> ApplicationStatus:
    """
    Raises:
        StartError: somebody has taken the application away.
    """
    applications = ray_serve.status().applications
    if app not in applications:
        raise StartError(f"the application {app} was taken away while it started")
    return applications[app].status


def _why(app: str, otherwise: str) -> str:
    try:
        application = ray_serve.status().applications[app]
        messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
        return "\n".join(messages) or application.message or otherwise
    except Exception:
        return otherwise


def _slowest(app: str) -> tuple[str, float] | None:
    """What the replica that is least far is doing, and how much of the start is done."""
    loading = [record.loading for record in current_records(app) if record.loading is not None]
    least = min(loading, key=lambda each: each.done, default=None)
    begin, end = LOADING_SPAN
    return None if least is None else (least.doing, begin + (end - begin) * least.done)


class ReplicaChangeLog:
    """Logs what befalls replicas, each thing once."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[str | None, bool]] = {}
        self._refused: set[str] = set()

    def update(self, records: Sequence[ReplicaRecord], refused: Mapping[str, Refusal]) -> None:
        """``refused``: see `cluster.directory.refusals`."""
        for replica, refusal in refused.items():
            if refusal.why not in self._refused:
                logger.error("replica %s cannot start where it was placed: %s", replica, refusal.why)
        self._refused = {refusal.why for refusal in refused.values()}  # of the last look: what is refused again and again is in each
        for record in records:
            last_loss, ready = self._told.get(record.id, (None, True))
            if record.last_loss is not None and record.last_loss != last_loss:
                logger.error("replica %s: %s", record.id, record.last_loss)
            if record.ready != ready:
                logger.warning("replica %s is %s", record.id, "ready again" if record.ready else f"not ready: {record.reason}")
            self._told[record.id] = (record.last_loss, record.ready)
