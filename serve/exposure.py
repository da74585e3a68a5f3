"""Warnings at the start of a server about who can reach it."""

import ipaddress
from collections.abc import Mapping

from serve.config import ServeConfig

EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104  (compared, not bound)


def exposure(config: ServeConfig) -> list[str]:
    """The warnings; none if only this machine can reach the ports, or keys and TLS are set."""
    apis = {api: host for api, host in (("HTTP", config.http.host), ("gRPC", config.grpc.host)) if not is_loopback(host)}
    if not apis:
        return []
    if config.auth.keys_file is None:
        return [
            f"NOBODY IS ASKED FOR A KEY, and {_where(apis)}: whoever reaches that can use the models"
            f"{', and over gRPC end the requests of others and drain the server' if 'gRPC' in apis else ''}. "
            "`manta keys create` makes keys; auth.keys_file names their file."
        ]
    if config.grpc.certificate is None and not is_loopback(config.grpc.host):
        return ["API keys come over gRPC in the clear: set grpc.certificate and grpc.key. (HTTP leaves TLS to what stands before it.)"]
    return []


def _where(apis: Mapping[str, str]) -> str:
    """``apis``: the address of each API by its name."""
    by_address: dict[str, list[str]] = {}
    for api, host in apis.items():
        by_address.setdefault("every address of this machine" if host in EVERY_ADDRESS else host, []).append(api)
    return " and ".join(f"{' and '.join(names)} listen{'s' * (len(names) == 1)} on {address}" for address, names in by_address.items())


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
