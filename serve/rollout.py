"""Deploy the application on a running Ray: start Ray Serve's proxies, deploy, follow the start, and log later changes of replicas.

Used for a private Ray (`serve.local_ray`) and for an existing one (`serve.existing_ray`).
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
"""The part of the overall start progress (0 to 1) that loading the weights covers."""
POLL_S = 0.3

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]
"""Called with (current activity, fraction of the start that is done, 0 to 1)."""


class StartError(RuntimeError):
    """The server could not start, or its Ray died; the message says why."""


@contextmanager
def as_start_error(doing: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError, ValueError, TimeoutError) as error:
        raise StartError(f"{doing} failed: {error}") from error


def start_proxies(config: ServeConfig, location: ProxyLocation) -> None:
    """Start Ray Serve with its HTTP and gRPC proxies. Has no effect if Ray Serve runs already."""
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
    """Deploy or update the application and wait until it runs. Reports the progress of the slowest replica.

    Raises:
        StartError: a replica refused its hosts (raised at once: Ray Serve would retry, and for ever if other replicas have
            started), or a deployment failed, with Ray Serve's message.
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
    reported = None
    while (status := _status(app)) is not ApplicationStatus.RUNNING:
        if refused := {refusal.why for refusal in refusals(app).values() if refusal.version == version}:
            raise StartError("\n".join(sorted(refused)))
        if status is ApplicationStatus.DEPLOY_FAILED:
            raise StartError(_why(app, f"Ray Serve could not deploy {app}"))
        if (slowest := _slowest(app)) not in (None, reported):
            reported = slowest
            on_progress(*slowest)
        time.sleep(POLL_S)


def _status(app: str) -> ApplicationStatus:
    """The status of an application.

    Raises:
        StartError: the application was removed meanwhile.
    """
    applications = ray_serve.status().applications
    if app not in applications:
        raise StartError(f"the application {app} was removed while it started")
    return applications[app].status


def _why(app: str, otherwise: str) -> str:
    try:
        application = ray_serve.status().applications[app]
        messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
        return "\n".join(messages) or application.message or otherwise
    except Exception:
        return otherwise


def _slowest(app: str) -> tuple[str, float] | None:
    """(activity, overall progress) of the replica that is furthest behind; None if none is loading."""
    loading = [record.loading for record in current_records(app) if record.loading is not None]
    least = min(loading, key=lambda each: each.done, default=None)
    begin, end = LOADING_SPAN
    return None if least is None else (least.doing, begin + (end - begin) * least.done)


class ReplicaChangeLog:
    """Logs losses, readiness changes and refusals of replicas, each once."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str | None, bool]] = {}
        self._refused: set[str] = set()

    def update(self, records: Sequence[ReplicaRecord], refused: Mapping[str, Refusal]) -> None:
        """Log what changed since the last call. ``refused``: see `cluster.directory.refusals`."""
        for replica, refusal in refused.items():
            if refusal.why not in self._refused:
                logger.error("replica %s cannot start where it was placed: %s", replica, refusal.why)
        self._refused = {refusal.why for refusal in refused.values()}  # of this call only: a repeated refusal is in every call
        for record in records:
            last_loss, ready = self._last.get(record.id, (None, True))
            if record.last_loss is not None and record.last_loss != last_loss:
                logger.error("replica %s: %s", record.id, record.last_loss)
            if record.ready != ready:
                logger.warning("replica %s is %s", record.id, "ready again" if record.ready else f"not ready: {record.reason}")
            self._last[record.id] = (record.last_loss, record.ready)
