"""TLS and mutual TLS for the gRPC port. Certificates are reloaded when their files change, so they can be renewed while serving."""

import logging
from collections.abc import Callable
from pathlib import Path

import grpc

logger = logging.getLogger(__name__)

Stamp = tuple[tuple[int, int], ...]


class TlsFiles:
    """The PEM files of a port: certificate chain, private key, and the authorities of its clients."""

    def __init__(self, *, certificate: Path | str, key: Path | str, client_ca: Path | str | None = None) -> None:
        """``client_ca``: clients must show a certificate of one of these authorities; None: clients need none."""
        self._paths = tuple(Path(path) for path in (certificate, key, *([client_ca] if client_ca else [])))
        self._needs_client_certificate = client_ca is not None

    def stamp(self) -> Stamp:
        """Changes when a file does.

        Raises:
            OSError: a file does not exist.
        """
        return tuple((status.st_mtime_ns, status.st_size) for status in (path.stat() for path in self._paths))

    def read(self) -> grpc.ServerCertificateConfiguration:
        """The certificates as the files hold them now.

        Raises:
            OSError: a file cannot be read.
            ValueError: it is not the PEM file that it should be.
        """
        certificate, key, *authorities = (path.read_bytes() for path in self._paths)
        words = ("CERTIFICATE", "PRIVATE KEY", "CERTIFICATE")
        for path, text, word in zip(self._paths, (certificate, key, *authorities), words, strict=False):
            if f"{word}-----".encode() not in text or b"-----BEGIN" not in text:
                raise ValueError(f"{path} holds no PEM block of a {word.lower()}")
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authorities[0] if authorities else None)

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`. Each new connection gets the certificate that is in the file at that time; if that is damaged or only
        half written, the last good one.

        Raises:
            OSError, ValueError: see `read`.
        """
        stamp, first = self.stamp(), self.read()
        return grpc.dynamic_ssl_server_credentials(
            first, self._fetcher(stamp), require_client_authentication=self._needs_client_certificate
        )

    def _fetcher(self, stamp: Stamp) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
        """The function that gRPC calls at each handshake. It returns None to keep what is in use."""
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
