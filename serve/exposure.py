"""What whoever starts a server should know of who can reach it."""

import ipaddress

from serve.config import ServeConfig


def exposure(config: ServeConfig) -> list[str]:
    """Sentences to be shown at the start; none where only this machine reaches the ports, or keys and TLS are set."""
    open_to_others = [host for host in dict.fromkeys((config.http.host, config.grpc.host)) if not _is_loopback(host)]
    if not open_to_others:
        return []
    if config.auth.keys_file is None:
        return [
            f"NOBODY IS ASKED FOR A KEY, and other machines reach {' and '.join(open_to_others)}: whoever does can use the models, and "
            "over gRPC end the requests of others and drain the server. `manta keys create` makes keys; auth.keys_file names their file."
        ]
    if config.grpc.certificate is None and not _is_loopback(config.grpc.host):
        return ["API keys come over gRPC in the clear: set grpc.certificate and grpc.key. (HTTP leaves TLS to what stands before it.)"]
    return []


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
