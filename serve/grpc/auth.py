"""Place 2 of a request over gRPC: the caller, by the key in the call's metadata."""

from serve.auth import Authenticator
from serve.caller import Caller, Scope
from serve.grpc.errors import CallContext


def caller_of(context: CallContext, authenticator: Authenticator, scope: Scope | None = None) -> Caller:
    """Who makes a call, by its metadata.

    Raises:
        NotAuthenticated, NotAllowed: see `Authenticator.authenticate`.
    """
    metadata = context.invocation_metadata() or ()
    credentials = [
        value if isinstance(value, str) else value.decode("latin-1") for key, value in metadata if key.lower() == "authorization"
    ]
    return authenticator.authenticate(credentials, scope)
