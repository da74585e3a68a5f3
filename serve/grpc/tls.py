"""TLS of the gRPC port, and mutual TLS. Certificates are read again when their files change, so they can be renewed while serving."""

import logging
from collections.abc import Callable
from pathlib import Path

import grpc

logger = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int], ...]


class TlsFiles:
    """The files of one port's identity: private key, certificate chain, and whom to let in."""

    def __init__(self, *, certificate: Path | str, key: Path | str, client_ca: Path | str | None = None) -> None:
        """All PEM. ``client_ca``: the authorities that clients' certificates must come from; without it none is asked for."""
        self._paths = tuple(Path(path) for path in (certificate, key, *([client_ca] if client_ca else [])))
        self._wants_clients = client_ca is not None

    def stamp(self) -> Stamp:
        """Changes when a file does.

        Raises:
            OSError: one is not there.
        """
        return tuple((status.st_mtime_ns, status.st_size) for status in (path.stat() for path in self._paths))

    def read(self) -> grpc.ServerCertificateConfiguration:
        """
        Raises:
            OSError: a file cannot be read.
            ValueError: it is not what it should be.
        """
        certificate, key, *authorities = (path.read_bytes() for path in self._paths)
        words = ("CERTIFICATE", "PRIVATE KEY", "CERTIFICATE")
        for path, text, word in zip(self._paths, (certificate, key, *authorities), words, strict=False):
            if f"{word}-----".encode() not in text or b"-----BEGIN" not in text:
                raise ValueError(f"{path} holds no PEM block of a {word.lower()}")
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authorities[0] if authorities else None)

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`. Each new connection is shown the certificate that lies there then; while a renewal is half written,
        or spoilt, the last good one.

        Raises:
            OSError, ValueError: see `read`.
        """
        stamp, first = self.stamp(), self.read()
        return grpc.dynamic_ssl_server_credentials(first, self._fetcher(stamp), require_client_authentication=self._wants_clients)

    def _fetcher(self, stamp: Stamp) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
        """Called by gRPC at each handshake; None keeps what is in use."""
        seen = stamp

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal seen
            try:
                now = self.stamp()
                if now == seen:
                    return None
                renewed = self.read()
            except (OSError, ValueError) as error:
                logger.warning("the certificate stays as it is: %s", error)
                return None
            seen = now
            logger.info("the certificate was renewed")
            return renewed

        return fetch
