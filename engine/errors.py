"""Errors of the engine. `serve/errors.py` maps each to an HTTP and a gRPC response."""

from engine.counted import counted


class EngineError(Exception):
    """Base class of all errors that the engine reports about a request or about itself."""


class EmptyPrompt(EngineError):
    def __init__(self) -> None:
        super().__init__("the prompt has no tokens; there is nothing to go on from")


class PromptTooLong(EngineError):
    def __init__(self, *, num_tokens: int, limit_tokens: int) -> None:
        super().__init__(f"the prompt has {num_tokens} tokens, and prompt and answer together may have {limit_tokens}; shorten the prompt")
        self.num_tokens, self.limit_tokens = num_tokens, limit_tokens


class PromptCannotBeCut(EngineError):
    """With non-causal attention all tokens of a prompt must be computed in one step, and this prompt is too long for that."""

    def __init__(self, *, num_tokens: int, limit_tokens: int) -> None:
        super().__init__(
            f"the input has {num_tokens} tokens, and this server computes at most {limit_tokens} in one step (engine.max_step_tokens); "
            "this model sees a text as a whole, so shorten it"
        )
        self.num_tokens, self.limit_tokens = num_tokens, limit_tokens


class KvCacheTooSmall(EngineError):
    """The request could never run, even alone."""

    def __init__(self, *, num_tokens: int, limit_tokens: int) -> None:
        super().__init__(
            f"prompt and max_tokens come to {num_tokens} tokens, and the KV cache of this replica holds {limit_tokens}; lower max_tokens"
        )
        self.num_tokens, self.limit_tokens = num_tokens, limit_tokens


class QueueFull(EngineError):
    def __init__(self, *, limit: int, retry_after_s: float = 1.0) -> None:
        super().__init__(f"{counted(limit, 'request is', 'requests are')} waiting already; try again in {retry_after_s:g} s")
        self.limit, self.retry_after_s = limit, retry_after_s


class DuplicateRequest(EngineError):
    def __init__(self, request_id: str) -> None:
        super().__init__(f"request {request_id} is running already")


class DeadlineExceeded(EngineError):
    """The request's own deadline passed."""


class InvalidLogits(EngineError):
    """The model gave NaN or no finite logits for this request."""


class GrammarFailed(EngineError):
    """The request's grammar is wrong, exceeds its cost limits, or allows no further token."""


class PoisonedRequest(EngineError):
    """The workers were lost so often while computing the request that it is not tried again; see `engine.isolation`."""


class EngineStopped(EngineError):
    """The engine was stopped before the request finished."""


class WorkersLost(EngineError):
    """The ranks can no longer compute steps: one died, raised, or did not answer in time.

    Raised by `PendingStep.result`. The KV cache is lost with the ranks.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        host: str | None = None,
        rank_traceback: str | None = None,
        last_collectives: tuple[str, ...] = (),
        from_outside: bool = False,
    ) -> None:
        super().__init__(message)
        self.rank, self.host, self.rank_traceback = rank, host, rank_traceback
        self.from_outside = from_outside
        """Whether what was computed need not be the cause: a process was killed or a host was lost, and no rank raised or crashed."""
        self.last_collectives = last_collectives
        """The last collective of each rank, where known."""
