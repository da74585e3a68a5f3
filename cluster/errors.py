"""Errors of this package. `serve/errors.py` maps each to an HTTP and a gRPC response."""

from engine.counted import counted
from engine.errors import EngineError, WorkersLost


class ReplicaLost(EngineError):
    """The replica that computed the answer was lost, and no attempt is left."""

    def __init__(self, *, attempts: int, last: str) -> None:
        super().__init__(f"the answer was lost {counted(attempts, 'time')} with its replica (last: {last}); try again")
        self.attempts = attempts


class HostUnreachable(WorkersLost):
    """The ranks were lost because `host`, where one of them ran, became unreachable."""


class HostLost(EngineError):
    """A host that computed the answer became unreachable, and no replica became ready to replace the one that it was part of."""

    def __init__(self, *, host: str, waited_s: float, retry_after_s: float = 5.0) -> None:
        super().__init__(
            f"host {host}, which computed the answer, cannot be reached any more, and no other replica became ready "
            f"within {waited_s:g} s; try again in {retry_after_s:g} s"
        )
        self.host, self.waited_s, self.retry_after_s = host, waited_s, retry_after_s


class ResumesExhausted(EngineError):
    """More streams lost their replica within a short time than may be resumed."""

    def __init__(self, *, resumes: int, window_s: float, retry_after_s: float = 5.0) -> None:
        super().__init__(f"more than {counted(resumes, 'answer')} lost a replica within {window_s:g} s; try again in {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class NoReplicaReady(EngineError):
    """No replica of the model is ready."""

    def __init__(self, *, waited_s: float, retry_after_s: float = 1.0) -> None:
        super().__init__(f"no replica became ready within {waited_s:g} s; try again in {retry_after_s:g} s")
        self.waited_s, self.retry_after_s = waited_s, retry_after_s


class SlowReader(EngineError):
    """The client does not read its stream."""

    def __init__(self, *, limit_tokens: int) -> None:
        super().__init__(f"more than {limit_tokens} tokens wait to be read; the choice was cancelled")
        self.limit_tokens = limit_tokens


class RequestAborted(EngineError):
    """An operator of the server ended the request; clients should not retry it."""

    def __init__(self) -> None:
        super().__init__("the request was ended by an operator of this server")


class ChannelError(EngineError):
    """A message of an unknown version or kind, a malformed one, or an endpoint that cannot be reached."""


class StartFailed(EngineError):
    """The ranks could not be started; the message has the error of the rank that failed."""


class UnfitHosts(StartFailed):
    """Checks before loading found that the ranks cannot run on these hosts, so retrying is useless; the message names the hosts."""


class RecoveryGivenUp(EngineError):
    """The ranks were lost too often in too short a time; the replica must be replaced."""
