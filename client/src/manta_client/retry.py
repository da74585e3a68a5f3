"""When to retry, and after how long."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType

import grpc

from .errors import CallFailed


@dataclass(frozen=True)
class RetryPolicy:
    """Pauses double from `first_pause_s` to `longest_pause_s`. Each is shortened by up to half at random, so that clients that failed
    together do not retry together. The pause in a server's RetryInfo is never shortened."""

    max_retries: int = 2
    max_resumes: int = 8
    """Attempts in a row, without a token between them, to resume a broken stream."""
    first_pause_s: float = 0.5
    longest_pause_s: float = 8.0
    on_retry: Callable[[CallFailed, int], None] | None = None
    """Called before each pause with the failure, and the number of attempts in a row that have failed."""

    def __post_init__(self) -> None:
        if min(self.max_retries, self.max_resumes, self.first_pause_s, self.longest_pause_s) < 0:
            raise ValueError("max_retries and pauses cannot be negative")


class Attempts:
    """Counts the attempts of one call, and the rest of its timeout."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        if not isinstance(timeout_s, (int, float, NoneType)):
            raise TypeError(f"timeout must be a number of seconds, not {timeout_s!r}")
        self._policy, self._clock, self._chance = policy, clock, chance
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._num_failed, self._most = 0, policy.max_retries

    def progressed(self) -> None:
        """A stream has delivered an event. From now on a failure is a broken stream, and attempts are counted anew."""
        self._num_failed, self._most = 0, self._policy.max_resumes

    def remaining_s(self) -> float | None:
        """The timeout of the next attempt; None: no limit."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._clock())

    def pause_s(self, failure: CallFailed) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            CallFailed: ``failure``, if another attempt would not help or would be too late. A traceback shows it without gRPC's own error,
                of which it says all.
        """
        self._num_failed += 1
        if not _is_transient(failure) or self._num_failed > self._most:
            raise failure from None
        pause_s = self._own_pause_s() if failure.retry_after is None else failure.retry_after * (1 + 0.25 * self._chance())
        remaining_s = self.remaining_s()
        if pause_s > self._policy.longest_pause_s * 1.25 or (remaining_s is not None and pause_s >= remaining_s):
            raise failure from None
        if self._policy.on_retry is not None:
            self._policy.on_retry(failure, self._num_failed)
        return pause_s

    def _own_pause_s(self) -> float:
        pause_s = min(self._policy.longest_pause_s, self._policy.first_pause_s * 2.0 ** (self._num_failed - 1))
        return pause_s * (1 - 0.5 * self._chance())


def _is_transient(failure: CallFailed) -> bool:
    """Whether the cause may pass by itself: the server is unavailable, or overloaded and has named a time to retry.

    INTERNAL without a reason does not come from Manta: Ray Serve's proxy, or gRPC itself, reports the loss of a front like this. A
    request with an idempotency key is computed once however often it is sent, so a retry does no harm.
    """
    if failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return failure.retry_after is not None
    return failure.code is grpc.StatusCode.UNAVAILABLE or (failure.code is grpc.StatusCode.INTERNAL and failure.reason is None)
