"""The examination where a replica would come to stand: actors of a real Ray."""

import pytest
import ray.exceptions

from cluster.config import RankResources
from cluster.doctor import cluster_survey
from cluster.doctor.cluster_survey import survey_cluster, unwrap_ray_error
from cluster.doctor.facts import Need
from cluster.doctor.findings import Severity
from cluster.doctor.survey import communication_failure
from parallel.topology import Topology

pytestmark = pytest.mark.usefixtures("own_ray")


def look() -> None:
    raise FileNotFoundError("there is no /models/x/config.json")


def test_every_rank_is_examined_and_the_links_measured() -> None:
    survey = survey_cluster(Topology(tp=2), RankResources(), Need(), host_check=None)
    assert [each.rank for each in survey.facts] == [0, 1]
    assert all(each.clock_ahead_at_least_s == 0 for each in survey.facts)
    assert [finding.check for finding in survey.findings].count("all-reduce") == 1
    assert all(finding.severity is not Severity.FATAL for finding in survey.findings)


def test_what_is_not_there_names_its_host() -> None:
    survey = survey_cluster(Topology(), RankResources(), Need(), host_check=look)
    (fatal,) = (finding for finding in survey.findings if finding.severity is Severity.FATAL)
    assert (fatal.check, fatal.host) == ("checkpoint", survey.facts[0].host)
    assert "/models/x/config.json" in fatal.found


def test_a_cluster_without_room_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_survey, "PLACE_S", 1.0)
    survey = survey_cluster(Topology(tp=2), RankResources(cpus=64), Need(), host_check=None)
    (finding,) = survey.findings
    assert (finding.severity, finding.check) == (Severity.FATAL, "placement")
    assert "2 ranks of 64 CPU" in finding.found


def test_what_a_rank_raised_is_told_without_what_ray_puts_around_it() -> None:
    raised = ray.exceptions.RayTaskError("measure", "ray::Examiner.measure() (pid=1, ip=10.0.0.1)\n", AssertionError("no CUDA here"))
    for error in (raised, raised.as_instanceof_cause()):
        assert (
            communication_failure("gpu-1", 0, unwrap_ray_error(error)).found
            == "rank 0 cannot take part in an all-reduce (AssertionError: no CUDA here)"
        )
    lost = ray.exceptions.RayActorError()
    assert unwrap_ray_error(lost) is lost
