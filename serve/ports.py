"""Check that the ports of the HTTP and gRPC APIs are free before anything is started."""

import errno
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.config import ServeConfig


class PortInUse(RuntimeError):
    def __init__(self, *, host: str, port: int, api: str, error: OSError) -> None:
        if error.errno == errno.EADDRINUSE:
            message = f"something listens on {host}:{port} already, perhaps another `manta serve`; choose another port with --{api}-port"
        elif error.errno == errno.EADDRNOTAVAIL:
            message = f"{host} is no address of this host; choose one with --{api}-host"
        else:
            message = f"cannot listen on {host}:{port} ({error.strerror or error}); choose another with --{api}-host and --{api}-port"
        super().__init__(message)
        self.host, self.port = host, port


def check_ports(config: "ServeConfig") -> None:
    """Check the HTTP and the gRPC port. Ray Serve's proxies set SO_REUSEPORT: a second server would share it and get half of the requests.

    Raises:
        PortInUse: see `check_free`.
    """
    check_free(config.http.host, config.http.port, api="http")
    check_free(config.grpc.host, config.grpc.port, api="grpc")


def check_free(host: str, port: int, *, api: str) -> None:
    """``api``: "http" or "grpc".

    Raises:
        PortInUse: another process listens there, or the address does not belong to this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT counts as free
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise PortInUse(host=host, port=port, api=api, error=error) from error
