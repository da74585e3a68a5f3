"""The chart as Helm sees it: both of its major versions render every set of values, and to the same objects."""

import re

import pytest
import yaml

from tests.k8s.chart import CHART, KINDS, READY, Refused, from_file, ready, run_helm, values_file

ALL = [*READY, *KINDS]


@pytest.mark.parametrize("major", ["3", "4"])
def test_helm_finds_nothing_to_remark(major: str) -> None:
    for name in ALL:
        done = run_helm(major, "lint", "--strict", str(CHART), "--values", str(values_file(name)))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("name", ALL)
def test_helm_4_makes_the_same_of_it_as_helm_3(name: str) -> None:
    three, four = ready(name, "3"), ready(name, "4")
    assert three.objects == four.objects


def test_the_ready_values_are_those_that_the_documentation_names() -> None:
    assert set(READY) == {"cpu-demo", "qwen2-7b-1gpu", "qwen2-72b-tp8", "qwen2-72b-2hosts", "qwen2-57b-a14b-ep8", "multi-model"}


def test_the_values_that_turn_everything_on_render_every_template() -> None:
    rendered = "".join(ready(name).text for name in ALL)
    templates = {path.relative_to(CHART).as_posix() for path in (CHART / "templates").rglob("*.yaml")}
    assert templates == set(re.findall(r"^# Source: manta/(templates/\S+)$", rendered, re.MULTILINE))


def test_values_are_few_enough_to_be_read() -> None:
    assert len((CHART / "values.yaml").read_text().splitlines()) < 200


def test_without_models_it_says_where_to_begin() -> None:
    with pytest.raises(Refused, match="models is empty: name at least one"):
        from_file(CHART / "values.yaml")


def test_every_object_names_its_namespace_and_whose_it_is() -> None:
    for name in ALL:
        for each in ready(name).objects:
            if each["metadata"]["name"] != "extra":
                assert each["metadata"]["namespace"] == "serving"
                assert each["metadata"]["labels"]["app.kubernetes.io/instance"] == "manta"
                assert each["metadata"]["labels"]["app.kubernetes.io/part-of"] == "manta"


def test_no_object_is_called_as_another_of_its_kind() -> None:
    for name in ALL:
        names = [(each["kind"], each["metadata"]["name"]) for each in ready(name).objects]
        assert len(names) == len(set(names))


def test_the_versions_are_those_of_the_package_and_of_its_ray() -> None:
    import tomllib

    project = tomllib.loads((CHART.parents[1] / "pyproject.toml").read_text())["project"]
    chart, values = (yaml.safe_load((CHART / file).read_text()) for file in ("Chart.yaml", "values.yaml"))
    assert chart["appVersion"] == project["version"]
    assert f"ray[serve]=={values['ray']['version']}" in project["dependencies"]


def notes(name: str) -> str:
    """What Helm tells after an installation (Helm 4: Helm 3 asks a cluster for it)."""
    done = run_helm("4", "install", "manta", str(CHART), "--dry-run=client", "--namespace", "serving", "--values", str(values_file(name)))
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


def test_the_notes_tell_how_to_reach_it_and_how_to_upgrade() -> None:
    told = notes("qwen2-7b-1gpu")
    assert "http://manta.serving:8000/v1" in told
    assert "grpc://manta.serving:9000" in told
    assert '"model": "qwen2-7b"' in told
    assert "helm upgrade manta CHART --namespace serving --server-side=false" in told
    assert "1 more GPUs are needed meanwhile" in told
    assert "NO API KEY IS REQUIRED" in told


def test_the_notes_know_what_was_chosen() -> None:
    told = notes("everything")
    assert "grpcs://manta.serving:9000" in told
    assert "https://manta.example.com/v1" in told
    assert "NO API KEY" not in told
    assert "delete the RayCluster" in notes("qwen2-72b-tp8")
    assert "get rayjob manta" in notes("batch")
