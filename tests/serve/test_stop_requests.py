"""The fronts of an application that is removed, as its remover sees them. `tests/system/test_joined.py` has real ones."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from serve import stop_requests


class Fronts:
    """A handle to one front, which ends its requests when it is told to, without grace, or cancelled."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.ended = threading.Event()
        self.answers = True

    def broadcast(self, method: str, *given: Any) -> "Call":
        self.told.append(method)
        if given == (0.0,):
            self.ended.set()
        return Call(self, method)


class Call:
    def __init__(self, fronts: Fronts, method: str) -> None:
        self._fronts, self._method = fronts, method

    def results(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        if not self._fronts.answers:
            threading.Event().wait()
        if self._method == "end_requests":
            self._fronts.ended.wait()
        return [1]

    def _fetch_replica_results_sync(self, timeout_s: float) -> list["Call"]:
        return [self]

    def cancel(self) -> None:
        self._fronts.told.append("cancel")
        self._fronts.ended.set()


@pytest.fixture
def fronts(monkeypatch: pytest.MonkeyPatch) -> Fronts:
    made = Fronts()
    monkeypatch.setattr(stop_requests.ray_serve, "get_deployment_handle", lambda *_: made)
    monkeypatch.setattr(stop_requests, "LONGEST_LAST_EVENTS_S", 0.0)
    return made


def ending(*, hurry: threading.Event | None = None, is_alive: Callable[[], bool] = lambda: True) -> Any:
    hurry = hurry or threading.Event()
    return stop_requests.requests_ending("app", grace_s=1e6, hurry=hurry, outlives_process=True, is_alive=is_alive)


def test_the_application_can_be_deleted_once_its_fronts_know(fronts: Fronts) -> None:
    with ending():
        assert fronts.told == ["drain", "end_requests"]
        fronts.ended.set()
    assert fronts.told[-1] == "end_requests"


def test_haste_ends_the_running_calls(fronts: Fronts) -> None:
    hurry = threading.Event()
    with ending(hurry=hurry):
        hurry.set()
    assert fronts.told == ["drain", "end_requests", "cancel", "end_requests"]


def test_fronts_that_start_meanwhile_are_told_too(fronts: Fronts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_requests, "DRAIN_AGAIN_S", 0.0)
    with ending():
        while fronts.told.count("drain") < 3:
            threading.Event().wait(0.05)
        fronts.ended.set()


def test_nothing_is_waited_for_where_ray_has_gone(fronts: Fronts) -> None:
    fronts.answers = False
    with ending(is_alive=lambda: False):
        pass
    assert fronts.told == ["drain"]


def test_fronts_that_cannot_be_told_do_not_keep_it(fronts: Fronts, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any) -> None:
        raise RuntimeError("no such deployment")

    monkeypatch.setattr(stop_requests.ray_serve, "get_deployment_handle", raising)
    with ending():
        pass
    assert fronts.told == []


@pytest.mark.parametrize(
    ("outlives_process", "in_job", "end"),
    [
        (True, False, "; Ctrl-C ends them at once"),
        (False, False, "; Ctrl-C ends them at once"),
        (True, True, ", also after Ray has ended this job"),
        (False, True, ", unless Ray ends this job before"),
    ],
)
def test_a_ray_job_is_told_nothing_of_ctrl_c(outlives_process: bool, in_job: bool, end: str) -> None:
    said = stop_requests.still_running(3, 30.0, outlives_process=outlives_process, in_job=in_job)
    assert said == f"3 requests are still running and may finish within 30 s{end}"


def test_one_request_is_not_several() -> None:
    said = stop_requests.still_running(1, 0.5, outlives_process=True, in_job=False)
    assert said == "1 request is still running and may finish within 0.5 s; Ctrl-C ends it at once"


def test_whether_this_is_a_ray_job_is_known_from_the_environment(
    fronts: Fronts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(stop_requests.JOB_VARIABLE, "{}")
    with ending():
        fronts.ended.set()
    assert [record.getMessage() for record in caplog.records] == [
        "1 request is still running and may finish within 1e+06 s, also after Ray has ended this job"
    ]
