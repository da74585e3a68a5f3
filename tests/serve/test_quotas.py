"""Quotas of a key: what is refused, for how long, and what is told about it."""

import asyncio

import pytest

from serve.caller import Caller, Quota, Scope
from serve.errors import QuotaExceeded, describe
from serve.quotas import Quotas
from serve.request import ChatRequest, Message, TextEvent, Usage


class Clock:
    now_s = 5.0

    def __call__(self) -> float:
        return self.now_s


def caller(**quota: int) -> Caller:
    return Caller(id="k", scopes=frozenset({Scope.INFER}), quota=Quota(**quota))


def asked(by: Caller) -> ChatRequest:
    return ChatRequest(request_id="r", model="m", messages=(Message(role="user", content="hi"),), caller=by)


def used(prompt: int, completion: int) -> TextEvent:
    return TextEvent(choice=0, usage_so_far=Usage(prompt_tokens=prompt, completion_tokens=completion))


def test_a_minutes_worth_of_requests_may_come_at_once_and_then_one_by_one() -> None:
    clock, key = Clock(), caller(requests_per_minute=6)
    quotas = Quotas(clock=clock)
    for _ in range(6):
        quotas.begin(asked(key)).ended()
    with pytest.raises(QuotaExceeded) as refused:
        quotas.begin(asked(key))
    assert refused.value.retry_after_s == pytest.approx(10)
    clock.now_s += 10
    quotas.begin(asked(key)).ended()
    with pytest.raises(QuotaExceeded):
        quotas.begin(asked(key))


def test_tokens_are_taken_as_they_come_and_a_key_waits_for_what_it_overdrew() -> None:
    clock, key = Clock(), caller(tokens_per_minute=60)
    quotas = Quotas(clock=clock)
    charge = quotas.begin(asked(key))
    charge.event(used(40, 1))
    charge.event(used(40, 50))
    charge.ended()
    with pytest.raises(QuotaExceeded) as refused:
        quotas.begin(asked(key))
    assert refused.value.retry_after_s == pytest.approx(31)
    clock.now_s += 31
    quotas.begin(asked(key))


@pytest.mark.parametrize("end", ["ended", "failed", "cancelled"])
def test_a_place_is_free_again_however_a_request_ends(end: str) -> None:
    quotas, key = Quotas(clock=Clock()), caller(concurrency=1)
    charge = quotas.begin(asked(key))
    with pytest.raises(QuotaExceeded, match="at the same time"):
        quotas.begin(asked(key))
    if end == "ended":
        charge.ended()
    else:
        charge.failed(asyncio.CancelledError() if end == "cancelled" else RuntimeError())
    quotas.begin(asked(key))


def test_one_key_does_not_use_up_anothers_quota() -> None:
    quotas, key = Quotas(clock=Clock()), caller(requests_per_minute=1)
    quotas.begin(asked(key))
    quotas.begin(asked(Caller(id="other", scopes=key.scopes, quota=key.quota)))


def test_of_several_fronts_each_gives_out_its_part() -> None:
    quotas, key = Quotas(num_fronts=lambda: 3, clock=Clock()), caller(requests_per_minute=6)
    quotas.begin(asked(key)).ended()
    quotas.begin(asked(key)).ended()
    with pytest.raises(QuotaExceeded):
        quotas.begin(asked(key))


def test_a_changed_quota_holds_at_once() -> None:
    clock = Clock()
    quotas = Quotas(clock=clock)
    for _ in range(4):
        quotas.begin(asked(caller(requests_per_minute=4))).ended()
    quotas.begin(asked(caller())).ended()
    quotas.begin(asked(caller(requests_per_minute=8))).ended()


def test_headers_tell_what_is_left() -> None:
    quotas, key = Quotas(clock=Clock()), caller(requests_per_minute=60, tokens_per_minute=600)
    quotas.begin(asked(key)).event(used(100, 20))
    assert quotas.headers(key) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "480",
        "x-ratelimit-reset-tokens": "12.000s",
    }
    assert quotas.headers(caller()) == {}


def test_the_refusal_says_which_quota_and_when_to_come_again() -> None:
    body = describe(QuotaExceeded("tokens per minute", limit=60, retry_after_s=31.0))
    assert (body.http_status, body.grpc_code, body.code) == (429, "RESOURCE_EXHAUSTED", "rate_limit_exceeded")
    assert (body.quota, body.retry_after_s) == ("tokens per minute", 31.0)
