"""Place 2 of a request: quotas of a key. Requests per minute, tokens per minute, and concurrent requests.

A bucket holds one minute's worth and fills continuously. Tokens are subtracted as they are computed, so a bucket can become negative;
the key then waits until it has filled again. So no request is refused for what it might have cost.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve.caller import Caller, Quota
from serve.errors import QuotaExceeded
from serve.request import AnyRequest, TextEvent, Usage

MINUTE_S = 60.0
BUSY_RETRY_S = 1.0
"""When to retry after a refusal for too many concurrent requests."""


@dataclass(slots=True)
class Bucket:
    """``level`` as of ``since_s``; ``limit`` is per minute."""

    limit: float
    level: float
    since_s: float

    def fill(self, now_s: float, limit: float) -> None:
        """Fill up to ``now_s``, then continue with ``limit`` if it has changed."""
        if limit != self.limit:
            self.level *= limit / self.limit
            self.limit = limit
        self.level = min(self.limit, self.level + (now_s - self.since_s) * self.limit / MINUTE_S)
        self.since_s = now_s

    def seconds_until(self, level: float) -> float:
        return max(level - self.level, 0.0) * MINUTE_S / self.limit


class _Account:
    """The use of one key on this front."""

    def __init__(self) -> None:
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.num_open = 0

    def fill(self, quota: Quota, parts: int, now_s: float) -> None:
        self.requests = _filled(self.requests, quota.requests_per_minute, parts, now_s)
        self.tokens = _filled(self.tokens, quota.tokens_per_minute, parts, now_s)


def _filled(bucket: Bucket | None, limit: int | None, parts: int, now_s: float) -> Bucket | None:
    if limit is None:
        return None
    own = limit / parts
    bucket = bucket or Bucket(limit=own, level=own, since_s=now_s)
    bucket.fill(now_s, own)
    return bucket


class Quotas:
    """An observer of requests that refuses those beyond their key's quota.

    Each of several fronts grants its share of a quota; ``num_fronts`` returns how many accept requests. A client that balances
    evenly over them gets the whole quota.
    """

    def __init__(self, *, num_fronts: Callable[[], int] = lambda: 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_fronts, self._clock = num_fronts, clock
        self._accounts: dict[str, _Account] = {}

    def begin(self, request: AnyRequest) -> "_Charge":
        """Charge a request to its caller's quotas.

        Raises:
            QuotaExceeded: names the quota, and when to retry.
        """
        caller = request.caller
        account = self._account(caller)
        self._check(caller.quota, account)
        if account.requests is not None:
            account.requests.level -= 1
        account.num_open += 1
        return _Charge(account)

    def headers(self, caller: Caller) -> Mapping[str, str]:
        """The rate limit headers of OpenAI's API; empty without quotas."""
        account, headers = self._account(caller), {}
        for name, bucket, whole in (
            ("requests", account.requests, caller.quota.requests_per_minute),
            ("tokens", account.tokens, caller.quota.tokens_per_minute),
        ):
            if bucket is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(whole)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(int(bucket.level * self._parts), 0))
                headers[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.limit):.3f}s"
        return headers

    @property
    def _parts(self) -> int:
        return max(self._num_fronts(), 1)

    def _account(self, caller: Caller) -> _Account:
        account = self._accounts.setdefault(caller.id, _Account())
        account.fill(caller.quota, self._parts, self._clock())
        return account

    def _check(self, quota: Quota, account: _Account) -> None:
        if quota.concurrency is not None and account.num_open >= -(-quota.concurrency // self._parts):
            raise QuotaExceeded("requests at the same time", limit=quota.concurrency, retry_after_s=BUSY_RETRY_S)
        if account.requests is not None and account.requests.level < 1:
            assert quota.requests_per_minute is not None
            wait_s = account.requests.seconds_until(1)
            raise QuotaExceeded("requests per minute", limit=quota.requests_per_minute, retry_after_s=wait_s)
        if account.tokens is not None and account.tokens.level <= 0:
            assert quota.tokens_per_minute is not None
            wait_s = account.tokens.seconds_until(min(1.0, account.tokens.limit))
            raise QuotaExceeded("tokens per minute", limit=quota.tokens_per_minute, retry_after_s=wait_s)


class _Charge:
    """Subtracts the tokens of one request from the account of its key as they come."""

    def __init__(self, account: _Account) -> None:
        self._account = account
        self._charged = 0

    def event(self, event: TextEvent) -> None:
        usage: Usage | None = event.usage or event.usage_so_far
        if usage is not None and self._account.tokens is not None:
            self._account.tokens.level -= usage.total_tokens - self._charged
            self._charged = usage.total_tokens

    def ended(self) -> None:
        self._account.num_open -= 1

    def failed(self, error: BaseException) -> None:
        self._account.num_open -= 1
