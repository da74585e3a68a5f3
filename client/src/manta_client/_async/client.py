"""The client."""

from collections.abc import Callable
from types import TracebackType

from ..endpoint import Access, Certificates
from ..errors import CallFailed
from ..retry import RetryPolicy
from .admin import AsyncAdmin
from .chat import AsyncChat
from .completions import AsyncCompletions
from .embeddings import AsyncEmbeddings
from .models import AsyncModels
from .tokens import AsyncTokens
from .transport import AsyncTransport

DEFAULT_TIMEOUT_S = 600.0
MAX_RESUMES = 8
"""About 40 s of pauses together: by then a lost front, or the proxy in front of it, has been replaced."""


class AsyncClient:
    """A connection to a Manta server.

    Args:
        endpoint: `grpc://host:port`, or `grpcs://host:port` for TLS; default: `MANTA_ENDPOINT`, else `grpc://127.0.0.1:9000`.
        api_key: sent with every call; default: `MANTA_API_KEY`.
        timeout: seconds per call, including retries; None: no limit.
        max_retries: attempts after the first, for calls and for the start of streams. 0: broken streams are not resumed either.
        root_certificates: PEM of the authority that signed the server's certificate; default: the machine's authorities.
        client_certificate: PEM of the client's certificate, for servers that require one (mutual TLS).
        client_key: PEM of its private key.
        allow_insecure_key: send the key to another machine even without TLS.
        on_retry: called before a call is tried again, or a broken stream resumed, with the failure and the number of attempts in a row
            that have failed.

    Raises:
        InvalidEndpoint: the endpoint cannot be read.
        InsecureKey: the key would be sent to another machine without TLS.
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
        on_retry: Callable[[CallFailed, int], None] | None = None,
    ) -> None:
        access = Access.resolve(endpoint, api_key, allow_insecure_key=allow_insecure_key)
        retry = RetryPolicy(max_retries=max_retries, max_resumes=MAX_RESUMES if max_retries else 0, on_retry=on_retry)
        certificates = Certificates(roots=root_certificates, chain=client_certificate, key=client_key)
        self._transport = AsyncTransport(access, certificates=certificates, timeout_s=timeout, retry=retry)
        self.models = AsyncModels(self._transport)
        self.chat = AsyncChat(self._transport, self.models)
        self.completions = AsyncCompletions(self._transport, self.models)
        self.tokens = AsyncTokens(self._transport, self.models)
        self.admin = AsyncAdmin(self._transport)
        self.embeddings = AsyncEmbeddings(self._transport, self.models)

    async def close(self) -> None:
        """Close the connection. Running calls are cancelled."""
        await self._transport.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncClient {self._transport!r}>"
