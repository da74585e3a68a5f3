"""The server's address, and whether a key may be sent there."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from .errors import InsecureKey, InvalidEndpoint, InvalidKey

DEFAULT = "grpc://127.0.0.1:9000"


@dataclass(frozen=True)
class Endpoint:
    """`grpc://host:port`, or `grpcs://host:port` for TLS."""

    host: str
    port: int
    secure: bool

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Parse an endpoint; the default scheme is `grpc://`.

        Raises:
            InvalidEndpoint: it does not have that form.
        """
        try:
            url = urlsplit(text if "://" in text else f"grpc://{text}")
            host, port = url.hostname, url.port
        except ValueError:  # brackets that are not around an IPv6 address, a port that is no number
            host = port = None
        if not host or port is None or url.scheme not in ("grpc", "grpcs") or url.path.strip("/"):
            raise InvalidEndpoint(f"{text!r} is not an endpoint: use grpc://host:port, or grpcs://host:port for TLS")
        return cls(host=host, port=port, secure=url.scheme == "grpcs")

    @property
    def target(self) -> str:
        """The endpoint in gRPC's notation."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """PEM certificates for TLS."""

    roots: bytes | None = None
    """Authorities of the server's certificate. None: the machine's."""
    chain: bytes | None = None
    """The client's certificate, for servers that require one."""
    key: bytes | None = field(default=None, repr=False)
    """Its private key."""

    def __post_init__(self) -> None:
        if (self.chain is None) != (self.key is None):
            raise ValueError("a client certificate needs its key, and the key its certificate; give both or neither")


def is_header_value(text: object) -> bool:
    """Whether gRPC can send this as the value of metadata: text in printable ASCII."""
    return isinstance(text, str) and text.isascii() and text.isprintable()


def check_key(key: str) -> None:
    """Refuse an API key that no request can carry. The commands that speak HTTP (`manta batch`, `manta bench serve`) ask here too.

    Raises:
        InvalidKey: it has characters that no API key has.
    """
    if not is_header_value(key):  # not repeated here: most of it may be right
        raise InvalidKey("the API key has characters other than printable ASCII, which no key has")


@dataclass(frozen=True)
class Access:
    """An endpoint and the API key for it."""

    endpoint: Endpoint
    api_key: str | None

    @classmethod
    def resolve(
        cls,
        endpoint: str | None,
        api_key: str | None,
        *,
        allow_insecure_key: bool,
        environment: Mapping[str, str] | None = None,
    ) -> "Access":
        """Take what is None from `MANTA_ENDPOINT` and `MANTA_API_KEY`.

        Raises:
            InvalidEndpoint: the endpoint cannot be parsed.
            InsecureKey: the key would cross a network without TLS.
            InvalidKey: the key has characters that no API key has.
        """
        environment = os.environ if environment is None else environment
        place = Endpoint.parse(endpoint or environment.get("MANTA_ENDPOINT") or DEFAULT)
        key = api_key or environment.get("MANTA_API_KEY") or None
        if key and not (place.secure or place.is_loopback or allow_insecure_key):
            raise InsecureKey(
                f"the API key would be readable on the way to {place.target}: use grpcs://, or pass allow_insecure_key=True "
                "where something else protects the connection"
            )
        if key:
            check_key(key)
        return cls(place, key)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def __repr__(self) -> str:
        return f"<Access {self.endpoint.target}{' with TLS' if self.endpoint.secure else ''}{' with a key' if self.api_key else ''}>"
