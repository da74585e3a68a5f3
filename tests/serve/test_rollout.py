"""Waiting for an application to run: what ends the wait, and with what words. Ray Serve is scripted."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.schema import ApplicationStatus

from cluster.directory import Refusal
from cluster.health import Loading
from serve import rollout
from serve.rollout import StartError, deploy

FOUND = "gpu-1: 1.0 GiB of memory are free, and the weights of its 2 rank(s) need 9.0 GiB; use more hosts"


Refusing = dict[str, str]
"""By replica, whose version is a part of its name: ``old/r1`` is of an earlier deployment, ``r1`` of this one."""


@dataclass(frozen=True)
class Target:
    app: SimpleNamespace
    name: str
    route_prefix: str


class Script:
    """What Ray Serve and the directory say, one look after the other; the last is repeated."""

    def __init__(self, *looks: tuple[ApplicationStatus | None, Refusing], message: str = "") -> None:
        self._looks, self._message = iter(looks), message
        self._now: tuple[ApplicationStatus | None, Refusing] = (None, {})
        self.deployed: list[Target] = []

    def run_many(self, targets: list[Any], *, wait_for_applications_running: bool) -> None:
        assert not wait_for_applications_running
        self.deployed += targets

    def status(self) -> Any:
        self._now = next(self._looks, self._now)
        application = SimpleNamespace(status=self._now[0], message="", deployments={"engine": SimpleNamespace(message=self._message)})
        return SimpleNamespace(applications={"manta": application} if self._now[0] else {})

    def refusals(self, app: str) -> dict[str, Refusal]:
        own = self.deployed[0].app.version
        return {name: Refusal(why=why, version=name.partition("/")[0] if "/" in name else own) for name, why in self._now[1].items()}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    monkeypatch.setattr(rollout, "POLL_S", 0)
    monkeypatch.setattr(rollout, "build_app", lambda _models, _config, version: SimpleNamespace(version=version))
    monkeypatch.setattr(rollout, "current_records", lambda _app: [SimpleNamespace(loading=Loading(doing="weights", done=0.5))])
    return []


def run(script: Script, monkeypatch: pytest.MonkeyPatch, told: list[tuple[str, float]]) -> None:
    fake = SimpleNamespace(run_many=script.run_many, status=script.status, RunTarget=Target)
    monkeypatch.setattr(rollout, "ray_serve", fake)
    monkeypatch.setattr(rollout, "refusals", script.refusals)
    deploy([], None, app="manta", on_progress=lambda doing, done: told.append((doing, done)))  # type: ignore[arg-type]
    assert [target.name for target in script.deployed] == ["manta"]


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


def test_what_replicas_of_an_earlier_version_find_is_not_held_against_this_one(monkeypatch: pytest.MonkeyPatch, told: list[Any]) -> None:
    """Ray Serve still starts some of them when this one has been deployed, and what one said before is there for a while."""
    said = {"old/r1": FOUND}
    run(Script((DEPLOYING, said), (DEPLOYING, said | {"old/r2": "another"}), (RUNNING, said)), monkeypatch, told)


def test_no_two_deployments_are_of_one_version(monkeypatch: pytest.MonkeyPatch, told: list[Any]) -> None:
    scripts = [Script((RUNNING, {})) for _ in range(2)]
    for script in scripts:
        run(script, monkeypatch, told)
    assert len({script.deployed[0].app.version for script in scripts}) == 2


def test_what_ray_serve_says_of_a_deployment_that_failed_is_passed_on(monkeypatch: pytest.MonkeyPatch, told: list[Any]) -> None:
    with pytest.raises(StartError, match="rank 1 cannot count"):
        run(Script((DEPLOYING, {}), (FAILED, {}), message="rank 1 cannot count"), monkeypatch, told)


def test_an_application_that_somebody_takes_away_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, told: list[Any]) -> None:
    with pytest.raises(StartError, match="removed"):
        run(Script((DEPLOYING, {}), (None, {})), monkeypatch, told)
