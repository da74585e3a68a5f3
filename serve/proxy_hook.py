"""Run by every Ray Serve proxy before it listens: its gRPC port gets address and TLS, headers not meant for clients are stripped,
and bytes that are no protobuf message reach our own refusal.

Ray Serve 2.60 binds HTTP where it is told and gRPC to every address of the host, with no setting for it. The one place
where it runs code of ours in the proxy before that is the callback named by `CALLBACK_VARIABLE`.
"""

import os
from collections.abc import Mapping
from typing import Any

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve.proxy_hook.before_listening"
HOST_VARIABLE = "MANTA_PROXY_GRPC_HOST"
"""Environment of the proxy's process: the address for gRPC. Unset = 127.0.0.1."""
TLS_VARIABLES = {"certificate": "MANTA_PROXY_GRPC_CERTIFICATE", "key": "MANTA_PROXY_GRPC_KEY", "client_ca": "MANTA_PROXY_GRPC_CLIENT_CA"}
"""Environment of the proxy's process: PEM files for TLS on the gRPC port. Without the first two it is in the clear."""
EVERY_ADDRESS = "[::]"
GRPC_MESSAGE_BYTES = 64 << 20
"""Ray Serve has one limit for both directions, 2 GiB unless told: enough for the largest answer with log-probabilities. A request
above `limits.body_bytes` is refused by us, one above this by gRPC."""


def variables(*, grpc_host: str, tls: Mapping[str, str | None] | None = None) -> Mapping[str, str]:
    """What Ray Serve's controller and proxies must find in their environment: on a cluster, that of `ray start` on every host.

    ``tls``: file by role, as in `TLS_VARIABLES`.
    """
    return {
        CALLBACK_VARIABLE: CALLBACK,
        HOST_VARIABLE: grpc_host,
        **{TLS_VARIABLES[role]: file for role, file in (tls or {}).items() if file},
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(GRPC_MESSAGE_BYTES),
        "SERVE_SOCKET_REUSE_PORT_ENABLED": "0",
    }


def before_listening() -> list[Any]:
    """Called by the proxy for its HTTP middlewares."""
    from ray.serve._private import default_impl
    from ray.serve._private.grpc_util import gRPCGenericServer

    from serve.grpc.unreadable import forgiving
    from serve.http.proxy_headers import proxy_middlewares

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
    gRPCGenericServer._override_method_handler = lambda server, method, handler: forgiving(override(server, method, handler))  # type: ignore[assignment, method-assign]
    default_impl.add_grpc_address = add_grpc_address  # type: ignore[assignment]
    return proxy_middlewares()


def bound_address(address: str, host: str) -> str:
    """Ray Serve's ``[::]:9000`` with ``host`` for its host."""
    if not address.startswith(f"{EVERY_ADDRESS}:"):
        raise ValueError(f"Ray Serve was to bind {address!r}; this hook was written for {EVERY_ADDRESS}")
    port = address.removeprefix(EVERY_ADDRESS)
    return f"[{host}]{port}" if ":" in host else f"{host}{port}"
