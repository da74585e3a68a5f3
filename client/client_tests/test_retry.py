import traceback

import grpc
import pytest
from manta_client.errors import CallFailed
from manta_client.retry import Attempts, RetryPolicy


def failure(code: grpc.StatusCode, retry_after: float | None = None) -> CallFailed:
    return CallFailed("no", code=code, retry_after=retry_after)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def attempts(
    policy: RetryPolicy | None = None, timeout_s: float | None = None, *, chance: float = 0.0, clock: Clock | None = None
) -> Attempts:
    return Attempts(policy or RetryPolicy(), timeout_s, clock=clock or Clock(), chance=lambda: chance)


def test_pauses_double_and_chance_shortens_them_by_up_to_half() -> None:
    policy = RetryPolicy(max_retries=4, first_pause_s=1.0, longest_pause_s=3.0)
    unavailable = failure(grpc.StatusCode.UNAVAILABLE)
    longest, shortest = attempts(policy), attempts(policy, chance=1.0)
    assert [longest.pause_s(unavailable) for _ in range(4)] == [1.0, 2.0, 3.0, 3.0]
    assert [shortest.pause_s(unavailable) for _ in range(4)] == [0.5, 1.0, 1.5, 1.5]


def test_whoever_wants_to_know_is_told_of_every_further_attempt_and_not_of_the_end() -> None:
    told: list[int] = []
    policy = RetryPolicy(max_retries=2, max_resumes=2, on_retry=lambda failure, num_failed: told.append(num_failed))
    unavailable, tries = failure(grpc.StatusCode.UNAVAILABLE), attempts(policy)
    for _ in range(2):
        tries.pause_s(unavailable)
    with pytest.raises(CallFailed):
        tries.pause_s(unavailable)
    tries.progressed()
    tries.pause_s(unavailable)
    assert told == [1, 2, 1]


def test_a_failure_is_shown_without_the_error_it_was_made_from() -> None:
    def fail() -> None:
        try:
            raise OSError("what gRPC says")
        except OSError:
            attempts().pause_s(failure(grpc.StatusCode.INVALID_ARGUMENT))

    with pytest.raises(CallFailed) as caught:
        fail()
    assert "what gRPC says" not in "".join(traceback.format_exception(caught.value))


def test_a_timeout_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="timeout must be a number of seconds, not '5'"):
        Attempts(RetryPolicy(), "5")  # type: ignore[arg-type]


def test_the_servers_time_is_never_undercut() -> None:
    busy = failure(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=2.0)
    assert attempts(chance=0.0).pause_s(busy) == 2.0
    assert attempts(chance=1.0).pause_s(busy) == 2.5


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_what_would_fail_again_is_not_tried_again(code: grpc.StatusCode) -> None:
    with pytest.raises(CallFailed):
        attempts().pause_s(failure(code))


def test_a_fault_of_the_server_itself_is_not_tried_again_one_of_the_way_to_it_is() -> None:
    with pytest.raises(CallFailed):
        attempts().pause_s(CallFailed("no", code=grpc.StatusCode.INTERNAL, reason="internal_error"))
    assert attempts().pause_s(failure(grpc.StatusCode.INTERNAL)) == 0.5


def test_once_a_stream_has_begun_tries_are_counted_from_its_last_progress() -> None:
    unavailable = failure(grpc.StatusCode.UNAVAILABLE)
    tries = attempts(RetryPolicy(max_retries=1, max_resumes=3))
    tries.pause_s(unavailable)
    tries.progressed()
    for _ in range(3):
        tries.pause_s(unavailable)
    with pytest.raises(CallFailed):
        tries.pause_s(unavailable)
    tries.progressed()
    tries.pause_s(unavailable)


def test_a_used_up_quota_without_a_time_is_not_tried_again() -> None:
    with pytest.raises(CallFailed):
        attempts().pause_s(failure(grpc.StatusCode.RESOURCE_EXHAUSTED))


def test_after_the_last_retry_the_failure_is_raised() -> None:
    tries = attempts(RetryPolicy(max_retries=1))
    last = failure(grpc.StatusCode.UNAVAILABLE)
    tries.pause_s(failure(grpc.StatusCode.UNAVAILABLE))
    with pytest.raises(CallFailed) as caught:
        tries.pause_s(last)
    assert caught.value is last


def test_the_timeout_covers_all_tries_and_no_pause_outlasts_it() -> None:
    clock = Clock()
    tries = attempts(timeout_s=1.0, clock=clock)
    assert tries.remaining_s() == 1.0
    clock.now_s += 0.6
    assert tries.remaining_s() == pytest.approx(0.4)
    with pytest.raises(CallFailed):
        tries.pause_s(failure(grpc.StatusCode.UNAVAILABLE))


def test_a_server_that_asks_for_a_very_long_pause_gets_an_error_instead() -> None:
    with pytest.raises(CallFailed):
        attempts().pause_s(failure(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=3_600))
