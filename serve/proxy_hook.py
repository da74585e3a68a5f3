"""Runs in every Ray Serve proxy before it listens, and changes what Ray Serve has no settings for:

- the gRPC port gets an address and TLS (Ray Serve 2.60 binds gRPC to every address of the host);
- headers that clients may not set are removed (`serve.http.proxy_headers`);
- undecodable gRPC messages become our own error (`serve.grpc.decode_errors`);
- chunks of streams arrive past Ray (`serve.bypass`);
- streams and connections of clients that do not read are ended (`serve.grpc.slow_clients`, `ConfiguredSockets`);
- the loss of a front becomes our own error;
- a client that goes leaves no traceback in the log.

The only code of ours that Ray Serve runs in the proxy before it listens is the callback named by `CALLBACK_VARIABLE`.
"""

import asyncio
import dataclasses
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve.proxy_hook.before_listening"
HOST_VARIABLE = "MANTA_PROXY_GRPC_HOST"
"""Environment variable of the proxy: the address for gRPC. Unset: 127.0.0.1."""
TLS_VARIABLES = {"certificate": "MANTA_PROXY_GRPC_CERTIFICATE", "key": "MANTA_PROXY_GRPC_KEY", "client_ca": "MANTA_PROXY_GRPC_CLIENT_CA"}
"""Environment variables of the proxy: PEM files for TLS on the gRPC port. Without the first two there is no TLS."""
SLOW_VARIABLE = "MANTA_PROXY_SLOW_CLIENT_TIMEOUT_S"
"""Environment variable of the proxy: how long a client may read nothing while data waits for it. Unset: `SLOW_CLIENT_TIMEOUT_S`."""
SLOW_CLIENT_TIMEOUT_S = 60.0
SEND_BUFFER_BYTES = 256 * 1024
"""Of a connection. The kernel's default would buffer megabytes for each client that does not read."""
EVERY_ADDRESS = "[::]"
GRPC_MESSAGE_BYTES = 64 << 20
"""Ray Serve has one limit for both directions, by default 2 GiB. This one is enough for the largest response with log-probabilities. A
request above `limits.body_bytes` is refused by us, one above this limit by gRPC."""
PROXY_CHECK_PERIOD_S = 1.0
"""Ray Serve replaces a proxy that was dead in three checks in a row, or did not answer three times within ten seconds. By default it
checks every ten seconds. (The period for fronts and replicas is `serve.deployment.HEALTH_CHECK_PERIOD_S`.)"""


def variables(
    *, grpc_host: str, tls: Mapping[str, str | None] | None = None, slow_client_timeout_s: float = SLOW_CLIENT_TIMEOUT_S
) -> Mapping[str, str]:
    """The environment that Ray Serve's controller and proxies need: on a cluster, that of `ray start` on every host.

    ``tls``: PEM file by role, as in `TLS_VARIABLES`.
    """
    return {
        CALLBACK_VARIABLE: CALLBACK,
        HOST_VARIABLE: grpc_host,
        **{TLS_VARIABLES[role]: file for role, file in (tls or {}).items() if file},
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(GRPC_MESSAGE_BYTES),
        **({} if slow_client_timeout_s == SLOW_CLIENT_TIMEOUT_S else {SLOW_VARIABLE: f"{slow_client_timeout_s:g}"}),
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": f"{PROXY_CHECK_PERIOD_S:g}",
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
    }


def before_listening() -> list[Any]:
    """Called by the proxy, which takes the result as its HTTP middlewares."""
    import ray
    from ray.serve._private import default_impl, http_util
    from ray.serve._private import proxy as _proxy
    from ray.serve._private.grpc_util import gRPCGenericServer
    from ray.serve._private.proxy_response_generator import ProxyResponseGenerator

    from serve.bypass import ProxyEndpoint
    from serve.grpc.bypass import receive_past_ray
    from serve.grpc.decode_errors import catch_decode_errors
    from serve.grpc.slow_clients import abort_slow_clients
    from serve.http.proxy_headers import proxy_middlewares

    proxy: Any = _proxy  # Any: mypy does not see the functions that this module imports
    endpoint = ProxyEndpoint(ray.get_runtime_context().get_node_id())
    slow_s = float(os.environ.get(SLOW_VARIABLE, SLOW_CLIENT_TIMEOUT_S))

    def add_grpc_address(server: Any, address: str) -> None:
        address = bound_address(address, os.environ.get(HOST_VARIABLE, "127.0.0.1"))
        files = {role: os.environ.get(name) for role, name in TLS_VARIABLES.items()}
        if files["certificate"] and files["key"]:
            from serve.grpc.tls import TlsFiles

            server.add_secure_port(
                address, TlsFiles(certificate=files["certificate"], key=files["key"], client_ca=files["client_ca"]).credentials()
            )
        else:
            server.add_insecure_port(address)

    override = gRPCGenericServer._override_method_handler
    gRPCGenericServer._override_method_handler = lambda server, method, handler: abort_slow_clients(  # type: ignore[assignment, method-assign]
        receive_past_ray(catch_decode_errors(override(server, method, handler)), endpoint), slow_s
    )
    default_impl.add_grpc_address = add_grpc_address  # type: ignore[assignment]
    http_util.socket = ConfiguredSockets(slow_s)  # type: ignore[attr-defined, assignment]  # http_util uses it only for the socket that it listens on
    proxy.get_http_response_status = with_manta_errors(proxy.get_http_response_status, over_grpc=False)
    proxy.get_grpc_response_status = with_manta_errors(proxy.get_grpc_response_status, over_grpc=True)
    read_errors_of_left_tasks(ProxyResponseGenerator)
    return proxy_middlewares(endpoint)


def read_errors_of_left_tasks(generator: Any) -> None:
    """Have the errors of the tasks in which Ray Serve waits for the next message read in any case.

    If the waiting call is cancelled, as it is when a client goes, Ray Serve cancels the request behind it and leaves the task, whose
    RequestCancelledError asyncio then reports with a traceback.
    """

    def reading(wait: Callable[[Any], Any]) -> Callable[[Any], Any]:
        async def wait_and_read(self: Any) -> Any:
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            return await wait(self)

        return wait_and_read

    for name in ("_await_response", "_await_response_anext"):
        setattr(generator, name, reading(getattr(generator, name)))


def with_manta_errors(status_of: Callable[..., Any], *, over_grpc: bool) -> Callable[..., Any]:
    """Ray Serve's function from an error to a status, with our own error bodies, which reveal no actors, hosts or tracebacks.

    If a front is lost or cannot be reached, the client learns that it may retry. An HTTP stream that has started can only be cut.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, gRPCStatusError

    from serve.errors import FrontLost, describe
    from serve.http.errors import error_object

    def our_status(error: BaseException, timeout_s: float | None, request_id: str) -> Any:
        status = status_of(error, timeout_s, request_id)
        if isinstance(error, (TimeoutError, asyncio.CancelledError, gRPCStatusError)):
            return status
        is_unreachable = isinstance(error, RayError) and not isinstance(error, RayTaskError)
        body = describe(FrontLost() if is_unreachable or isinstance(error, (BackPressureError, DeploymentUnavailableError)) else error)
        if over_grpc:
            return dataclasses.replace(status, code=type(status.code)[body.grpc_code], message=body.message)
        headers = [(b"retry-after", b"%d" % body.retry_after_s)] if body.retry_after_s else None
        return dataclasses.replace(status, code=body.http_status, message=error_object(body), headers=headers)

    return our_status


class ConfiguredSockets:
    """Stands for the module `socket` where Ray Serve makes the socket for HTTP. Connections inherit the options set here.

    SO_REUSEADDR: connections of a killed proxy stay in TIME_WAIT for a minute, and without it their port could not be bound meanwhile.
    (SO_REUSEPORT, which Ray Serve can set instead, would let two servers share a port by mistake.)
    TCP_USER_TIMEOUT: the kernel ends a connection whose client takes no data for this long. Only the kernel knows what still waits to
    be sent after a response was written.
    """

    def __init__(self, slow_client_timeout_s: float) -> None:
        self._slow_client_timeout_s = slow_client_timeout_s

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def socket(self, *kind: Any) -> socket.socket:
        made = socket.socket(*kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._slow_client_timeout_s * 1000))
        return made


def bound_address(address: str, host: str) -> str:
    """``address``, which is Ray Serve's ``[::]:PORT``, with ``host`` in place of ``[::]``."""
    if not address.startswith(f"{EVERY_ADDRESS}:"):
        raise ValueError(f"Ray Serve was about to bind {address!r}; this hook expects {EVERY_ADDRESS}")
    port = address.removeprefix(EVERY_ADDRESS)
    return f"[{host}]{port}" if ":" in host else f"{host}{port}"
