"""Waiting for an application to run: what ends the wait, and with what words. Ray Serve is scripted."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.schema import ApplicationStatus

from cluster.health import Loading
from serve import deploying
from serve.deploying import StartError, deploy

FOUND = "gpu-1: 1.0 GiB of memory are free, and the weights of its 2 rank(s) need 9.0 GiB; use more hosts"


class Script:
    """What Ray Serve and the directory say, one look after the other; the last is repeated."""

    def __init__(self, *looks: tuple[ApplicationStatus | None, dict[str, str]], message: str = "") -> None:
        self._looks, self._message = iter(looks), message
        self._now: tuple[ApplicationStatus | None, dict[str, str]] = (None, {})
        self.deployed: list[str] = []

    def run_many(self, targets: list[Any], *, wait_for_applications_running: bool) -> None:
        assert not wait_for_applications_running
        self.deployed += [target.name for target in targets]

    def status(self) -> Any:
        self._now = next(self._looks, self._now)
        application = SimpleNamespace(status=self._now[0], message="", deployments={"engine": SimpleNamespace(message=self._message)})
        return SimpleNamespace(applications={"manta": application} if self._now[0] else {})

    def refusals(self, app: str) -> dict[str, str]:
        return self._now[1]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    monkeypatch.setattr(deploying, "POLL_S", 0)
    monkeypatch.setattr(deploying, "build_app", lambda _models, _config: SimpleNamespace())
    monkeypatch.setattr(deploying, "current_records", lambda _app: [SimpleNamespace(loading=Loading(doing="weights", done=0.5))])
    return []


def run(script: Script, monkeypatch: pytest.MonkeyPatch, told: list[tuple[str, float]]) -> None:
    target = lambda app, name, route_prefix: SimpleNamespace(name=name)  # noqa: E731
    fake = SimpleNamespace(run_many=script.run_many, status=script.status, RunTarget=target)
    monkeypatch.setattr(deploying, "ray_serve", fake)
    monkeypatch.setattr(deploying, "refusals", script.refusals)
    deploy([], None, app="manta", on_progress=lambda doing, done: told.append((doing, done)))  # type: ignore[arg-type]
    assert script.deployed == ["manta"]


DEPLOYING, RUNNING, FAILED = ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING, ApplicationStatus.DEPLOY_FAILED


def test_it_waits_until_the_application_runs_and_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch, told: list[Any]) -> None:
    run(Script((DEPLOYING, {}), (DEPLOYING, {}), (RUNNING, {})), monkeypatch, told)
    assert told == [("starting the replicas", 0.15), ("weights", pytest.approx(0.55))]


def test_a_replica_whose_hosts_are_unfit_ends_the_wait_though_ray_would_try_for_ever(
    monkeypatch: pytest.MonkeyPatch, told: list[Any]
) -> None:
    with pytest.raises(StartError) as refused:
        run(Script((DEPLOYING, {}), (DEPLOYING, {"r1": FOUND, "r2": FOUND})), monkeypatch, told)
    assert str(refused.value) == FOUND, "what two replicas found is said once"


def test_what_an_earlier_try_found_is_not_held_against_this_one(monkeypatch: pytest.MonkeyPatch, told: list[Any]) -> None:
    script = Script((DEPLOYING, {"before": FOUND}), (RUNNING, {"before": FOUND}))
    monkeypatch.setattr(script, "_now", (None, {"before": FOUND}))
    run(script, monkeypatch, told)


def test_what_ray_serve_says_of_a_deployment_that_failed_is_passed_on(monkeypatch: pytest.MonkeyPatch, told: list[Any]) -> None:
    with pytest.raises(StartError, match="rank 1 cannot count"):
        run(Script((DEPLOYING, {}), (FAILED, {}), message="rank 1 cannot count"), monkeypatch, told)


def test_an_application_that_somebody_takes_away_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, told: list[Any]) -> None:
    with pytest.raises(StartError, match="taken away"):
        run(Script((DEPLOYING, {}), (None, {})), monkeypatch, told)
