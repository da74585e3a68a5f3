# Generated from `_async/client.py` by client/unasync.py. Do not edit.
"""The client itself."""

from types import TracebackType

from ..endpoint import Access, Certificates
from ..retry import RetryPolicy
from .admin import Admin
from .chat import Chat
from .completions import Completions
from .embeddings import Embeddings
from .models import Models
from .tokens import Tokens
from .transport import Transport

DEFAULT_TIMEOUT_S = 600.0
MAX_RESUMES = 8
"""Pauses of some 40 s together: a lost front, or the proxy before it, is back by then."""


class Client:
    """A connection to a Manta server.

    Args:
        endpoint: `grpc://host:port`, or `grpcs://host:port` for TLS; if not said, `MANTA_ENDPOINT`, else `grpc://127.0.0.1:9000`.
        api_key: shown to the server with every call; if not said, `MANTA_API_KEY`.
        timeout: seconds per call, retries included; None waits for ever.
        max_retries: tries after the first, for calls and for the beginning of streams; 0: nor is a stream that broke gone on with.
        root_certificates: PEM of the authority that signed the server's certificate; if not said, the machine's own.
        client_certificate: PEM of the certificate to show to a server that asks for one (mutual TLS).
        client_key: PEM of its private key.
        allow_insecure_key: send the key without TLS to another machine too.

    Raises:
        InvalidEndpoint: the endpoint cannot be read.
        InsecureKey: the key would be sent in the clear to another machine.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        max_retries: int = 2,
        root_certificates: bytes | None = None,
        client_certificate: bytes | None = None,
        client_key: bytes | None = None,
        allow_insecure_key: bool = False,
    ) -> None:
        access = Access.resolve(endpoint, api_key, allow_insecure_key=allow_insecure_key)
        retry = RetryPolicy(max_retries=max_retries, max_resumes=MAX_RESUMES if max_retries else 0)
        certificates = Certificates(roots=root_certificates, chain=client_certificate, key=client_key)
        self._transport = Transport(access, certificates=certificates, timeout_s=timeout, retry=retry)
        self.models = Models(self._transport)
        self.chat = Chat(self._transport, self.models)
        self.completions = Completions(self._transport, self.models)
        self.tokens = Tokens(self._transport, self.models)
        self.admin = Admin(self._transport)
        self.embeddings = Embeddings(self._transport, self.models)

    def close(self) -> None:
        """Close the connection; calls that are under way are cancelled."""
        self._transport.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self._transport!r}>"
