"""Run the server on a private Ray on this machine: start Ray, deploy, wait until the server is ready, and clean up at the end."""

import contextlib
import dataclasses
import logging
import math
import os
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import ray._private.worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.serve.config import ProxyLocation
from ray.serve.context import _get_global_client

from cluster.channel import PrivateFolder
from cluster.directory import ReplicaRecord, current_records, refusals
from cluster.placement import cpus_needed
from serve import proxy_hook
from serve.config import ServeConfig
from serve.deployment import APP, ServedModel
from serve.grpc.tls import TlsFiles
from serve.local_servers import registered
from serve.ports import PortInUse, check_ports
from serve.rollout import OnProgress, ReplicaChangeLog, StartError, as_start_error, deploy, start_proxies
from serve.stop_requests import requests_ending
from serve.stop_signals import StopSignals

LOOPBACK = "127.0.0.1"  # Ray 2.60 uses the host's address instead; docs/keys.md describes the consequences
STOP_S = 6.0
"""Time for Ray Serve to stop the deployments when the server stops; processes that remain are then killed."""
STOP_MARGIN_S = 1.0
DRAIN_S = 2.0
"""Time for replicas to finish what runs once the fronts have ended their requests. Short: nobody reads it."""
NICENESS = "RAY_worker_niceness"
FOR_NOBODY = {"RAY_enable_metrics_collection": "0", "RAY_task_events_report_interval_ms": "0"}
"""Turn off reports that only Ray's dashboard uses. Manta has `manta top` and /metrics instead."""
CONTROL_LOOP = "RAY_SERVE_CONTROL_LOOP_INTERVAL_S"
CONTROL_LOOP_S = 0.25
"""Period of the control loop of Ray Serve's controller, which queries the GCS three times per iteration. Ray's default of 0.1 s takes
noticeable CPU time from the model on a host with few cores."""
LONGEST_SOCKET = 107
"""Maximum length of a Unix socket's path, in bytes."""
MARK = "RAY_AUTH_TOKEN_PATH"
"""Environment variable that identifies the processes of one server: each server has its own token file."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalServer:
    """A server that is ready."""

    http: str
    """Base URL."""
    grpc: str
    """host:port"""
    stopped: threading.Event
    ray_processes: tuple[psutil.Process, ...]

    def records(self) -> tuple[ReplicaRecord, ...]:
        """The replicas' own reports."""
        return current_records(APP)

    def ended_process(self) -> psutil.Process | None:
        """One of Ray's own processes that has ended; None while all run."""
        return next((one for one in self.ray_processes if not one.is_running() or one.status() == psutil.STATUS_ZOMBIE), None)

    def wait(self) -> None:
        """Wait for SIGINT or SIGTERM. Meanwhile log changes of replicas.

        Raises:
            StartError: one of Ray's own processes died.
        """
        changes = ReplicaChangeLog()
        while not self.stopped.wait(1.0):
            if (ended := self.ended_process()) is not None:
                raise StartError(f"a process of Ray (pid {ended.pid}) has ended")
            changes.update(current_records(APP), refusals(APP))


@contextmanager
def run_local(
    models: Sequence[ServedModel], config: ServeConfig, on_progress: OnProgress = lambda _doing, _done: None
) -> Iterator[LocalServer]:
    """Start Ray, the replicas and the fronts. On exit, running requests get `replica.drain_timeout_s` to finish, and an error after it;
    then everything is stopped within ten seconds.

    For the main thread only. SIGINT and SIGTERM interrupt the start; afterwards the first one sets `LocalServer.stopped`, and a second one
    ends the time for running requests.

    Raises:
        StartError: something could not start; the message says what and why.
        KeyboardInterrupt: stopped during the start.
    """
    grace_s = max(model.config.replica.drain_timeout_s for model in models)
    models = [dataclasses.replace(model, config=_on_one_host(model.config)) for model in models]
    http, grpc = _url(config.http.host, config.http.port), f"{config.grpc.host}:{config.grpc.port}"
    stop = StopSignals()
    try:
        check_ports(config)
    except PortInUse as error:
        raise StartError(str(error)) from error
    _check_tls(config)
    with ExitStack() as stack:
        stack.enter_context(stop.handled())
        folder, variables = _folder_and_variables(config, stack)
        stack.enter_context(_no_process_left(variables, None if config.ray.temp_dir else folder))
        stack.enter_context(_environment(variables))
        set_address = stack.enter_context(registered(variables[MARK], http=http))
        try:
            on_progress("starting Ray", 0.0)
            with as_start_error("starting Ray"):
                _start_ray(models, config, folder)
            stop.install()  # again: Ray installed its own handlers
            set_address(ray.get_runtime_context().gcs_address)  # `manta status` shows the server while it loads
            _hush_ray()
            on_progress("starting Ray Serve", 0.05)
            with as_start_error("starting Ray Serve"):
                start_proxies(config, ProxyLocation.HeadOnly)
            deploy(models, config, app=APP, on_progress=on_progress)
            _await_answer(config)
            stop.starting = False
            on_progress("ready", 1.0)
            server = LocalServer(http=http, grpc=grpc, stopped=stop.stopped, ray_processes=tuple(psutil.Process().children()))
            yield server
            with requests_ending(  # not after an error: Ray itself may be gone
                APP, grace_s=grace_s, hurry=stop.repeated, outlives_process=False, is_alive=lambda: server.ended_process() is None
            ):
                pass
        except KeyboardInterrupt:
            on_progress("ending what was started", 1.0)
            raise
        finally:
            stop.starting = False
            _end_ray()


def _on_one_host(config: ServeConfig) -> ServeConfig:
    replica = dataclasses.replace(config.replica, drain_timeout_s=DRAIN_S, other_hosts=False)
    return config.model_copy(update={"replica": replica})


def _check_tls(config: ServeConfig) -> None:
    """Check the TLS files first: with bad files the proxy would only log the error, and nothing would listen."""
    if config.grpc.certificate is None or config.grpc.key is None:
        return
    try:
        TlsFiles(certificate=config.grpc.certificate, key=config.grpc.key, client_ca=config.grpc.client_ca).credentials()
    except (OSError, ValueError) as error:
        raise StartError(f"the files for TLS (grpc.certificate, grpc.key, grpc.client_ca) cannot be used: {error}") from error


def _start_ray(models: Sequence[ServedModel], config: ServeConfig, folder: Path) -> None:
    needed = sum(model.config.replicas.most * cpus_needed(model.config.parallel.topology, model.config.resources) for model in models)
    ray.init(
        address="local",
        num_cpus=math.ceil(config.ray.num_cpus or needed),
        namespace=config.ray.namespace,
        include_dashboard=config.ray.dashboard,
        object_store_memory=config.ray.object_store_bytes,
        log_to_driver=False,
        logging_level=logging.DEBUG if config.logging.level == "debug" else logging.WARNING,
        _temp_dir=str(folder),
        _node_ip_address=LOOPBACK,
    )


def _hush_ray() -> None:
    """Send what Ray's processes would print to the terminal to the log instead, subject to `logging.level`."""
    ray._private.worker.print_to_stdstream = _log_report  # type: ignore[assignment]
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


def _log_report(report: dict[str, Any], ignore_prefix: bool = False) -> None:
    logger.debug("ray: %s", " ".join(report["lines"]))


def _await_answer(config: ServeConfig) -> None:
    deadline = time.monotonic() + config.router.ready_wait_s
    while not _answers(_url(config.http.host, config.http.port) + "/readyz"):
        if time.monotonic() > deadline:
            raise StartError(f"everything is loaded, but not ready on {config.http.host}:{config.http.port}")
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:  # noqa: S310  (our own http:// address)
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end_ray() -> None:
    """Give the deployments time to stop by themselves, then shut Ray down."""
    if not ray.is_initialized():
        return
    ending = threading.Thread(target=_end_serve, name="end-serve", daemon=True)  # a thread, because the call hangs if the GCS is gone
    ending.start()
    ending.join(STOP_S + STOP_MARGIN_S)
    ray.shutdown()


def _end_serve() -> None:
    """Stop Ray Serve with our own timeout. `ray.serve.shutdown` waits longer, and a call that still waits when Ray shuts down makes Ray
    exit this process."""
    with contextlib.suppress(Exception):  # Ray may be gone already
        client: Any = _get_global_client(raise_if_no_controller_running=False)
        if client is not None:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)  # do not warn about deployments that take longer: they are killed next
            client.shutdown(timeout_s=STOP_S)


@contextmanager
def _no_process_left(variables: Mapping[str, str], folder: Path | None) -> Iterator[None]:
    """Run `serve.process_reaper`, which kills whatever was started inside this context, even if this process is killed."""
    command = [sys.executable, "-m", "serve.process_reaper", f"{MARK}={variables[MARK]}", *([str(folder)] if folder else [])]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=root, start_new_session=True):  # noqa: S603  (our own module)
        yield  # on exit, Popen closes the pipe and waits for the reaper


def _variables(config: ServeConfig, folder: Path) -> Mapping[str, str]:
    """Environment variables for Ray's processes, and for this process while Ray runs."""
    token = folder / f"token-{secrets.token_hex(4)}"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    root = str(Path(__file__).parent.parent)
    return {
        "RAY_AUTH_MODE": "token",
        MARK: str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",
        NICENESS: os.environ.get(NICENESS, "0"),  # Ray's default is 15, which starves ranks when anything else uses the CPU
        CONTROL_LOOP: os.environ.get(CONTROL_LOOP, f"{CONTROL_LOOP_S:g}"),
        **({} if config.ray.dashboard else {name: os.environ.get(name, value) for name, value in FOR_NOBODY.items()}),
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        **proxy_hook.variables(
            grpc_host=config.grpc.host, tls=_absolute(config.grpc.tls), slow_client_timeout_s=config.http.slow_client_timeout_s
        ),
    }


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    _have_ray_look_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _have_ray_look_again()


def _have_ray_look_again() -> None:
    """Make Ray re-read its environment, which it reads on import, before these variables are known."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _folder_and_variables(config: ServeConfig, stack: ExitStack) -> tuple[Path, Mapping[str, str]]:
    """The folder for Ray's files, and the environment variables of its processes.

    Raises:
        StartError: Ray's files cannot lie there; says what to set instead.
    """
    try:
        folder = stack.enter_context(_folder(config))
        variables = _variables(config, folder)
    except OSError as error:
        raise StartError(f"Ray's sockets and logs have no place: {error}; set TMPDIR, or ray.temp_dir, to another folder") from error
    socket = f"{os.path.abspath(folder)}/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    if (excess := len(os.fsencode(socket)) - LONGEST_SOCKET) > 0:
        where = f"ray.temp_dir, {folder}," if config.ray.temp_dir else f"the folder for temporary files, {folder.parent},"
        raise StartError(
            f"{where} is {excess} bytes too long for Ray's sockets; set TMPDIR (or ray.temp_dir) to a shorter one, such as /tmp"
        )
    return folder, variables


@contextmanager
def _folder(config: ServeConfig) -> Iterator[Path]:
    """Folder for Ray's sockets and logs: the configured one, or a private one that is removed at the end."""
    if config.ray.temp_dir is not None:
        place = Path(config.ray.temp_dir)
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        yield place
        return
    private = PrivateFolder()
    try:
        yield private.path
    finally:
        private.close()


def _absolute(files: Mapping[str, str | None]) -> Mapping[str, str | None]:
    """Absolute paths, because Ray's processes have other working directories."""
    return {role: file and os.path.abspath(file) for role, file in files.items()}


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
