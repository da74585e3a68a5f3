"""Whether the ports of the fronts are free, asked before anything is started."""

import socket


class PortInUse(RuntimeError):
    def __init__(self, *, host: str, port: int, setting: str, reason: str) -> None:
        super().__init__(f"{host}:{port} cannot be listened on ({reason}); choose another with --set {setting}=PORT")
        self.host, self.port = host, port


def check_free(host: str, port: int, *, setting: str) -> None:
    """
    Raises:
        PortInUse: somebody listens there, or the address is not one of this host.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that is only cooling down is free
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise PortInUse(host=host, port=port, setting=setting, reason=error.strerror or str(error)) from error
