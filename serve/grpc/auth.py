"""Step 2 of a request, over gRPC: whose key the call's metadata shows."""

from collections.abc import Sequence
from typing import Protocol

from serve.caller import Caller, Scope
from serve.grpc.errors import CallContext


class Admits(Protocol):
    """`serve.auth.Doorkeeper` is one."""

    def admit(self, credentials: Sequence[str], scope: Scope | None = None) -> Caller: ...


def caller_of(context: CallContext, door: Admits, scope: Scope | None = None) -> Caller:
    """
    Raises:
        NotAuthenticated, NotAllowed: as `Admits.admit` says.
    """
    metadata = context.invocation_metadata() or ()
    shown = [value if isinstance(value, str) else value.decode("latin-1") for key, value in metadata if key.lower() == "authorization"]
    return door.admit(shown, scope)
