"""Alerts and dashboards: they ask for nothing that /metrics does not tell, and the alerts fire when they should and only then."""

import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.serve._private import request_ingress_metrics

from k8s.dashboards import DASHBOARDS, FOLDER, dashboard
from serve.errors import ERROR_MAPPINGS
from serve.metric_names import METRICS, Kind
from serve.request_observer import STOPPED
from tests.k8s.chart import ready

SUFFIXES = {Kind.COUNTER: ("_total",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
TOLD = {f"{metric.name}{suffix}" for metric in METRICS for suffix in SUFFIXES[metric.kind]}
LABELS = {metric.name: set(metric.labels) for metric in METRICS}
BY_PROMETHEUS = {"namespace", "job", "le", "instance", "pod", "__name__"}


def rules() -> list[dict]:
    (group,) = ready("everything").one("PrometheusRule")["spec"]["groups"]
    return group["rules"]


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    for name in DASHBOARDS:
        for panel in json.loads(dashboard(name))["panels"]:
            yield from (target["expr"] for target in panel["targets"])


def test_only_metrics_are_asked_for_that_are_told() -> None:
    asked = {name for query in queries() for name in re.findall(r"manta_\w+", query)}
    assert len(asked) > 20
    assert asked <= TOLD


def test_of_rays_metrics_only_its_proxies_errors_are_asked_for() -> None:
    """As seen with Ray 2.60 on the port of its metrics agent; Ray itself adds the beginning and the end of these names."""
    asked = {name for query in queries() for name in re.findall(r"ray_\w+", query)}
    made = inspect.getsource(request_ingress_metrics)
    assert 'f"serve_num_{protocol_name}_error_requests"' in made
    assert '"error_code"' in made
    assert asked == {f"ray_serve_num_{protocol}_error_requests_total" for protocol in ("http", "grpc")}


def test_only_labels_are_chosen_that_the_metric_has() -> None:
    for query in queries():
        for name, chosen in re.findall(r"(manta_\w+)\{([^}]*)\}", query):
            labels = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)"', chosen))
            known = LABELS[re.sub(r"_(total|bucket|sum|count)$", "", name)] if name not in LABELS else LABELS[name]
            assert labels <= known | BY_PROMETHEUS, (name, labels)


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_the_dashboards_are_fresh(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == dashboard(name), "run: python k8s/dashboards.py"


def test_the_chart_brings_them_as_config_maps_for_grafanas_sidecar() -> None:
    for name in DASHBOARDS:
        brought = ready("everything").one("ConfigMap", f"dashboard-{name}")
        assert brought["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(brought["data"][f"{name}.json"]) == json.loads(dashboard(name))


def test_what_counts_against_the_objective_is_what_failed_by_our_doing() -> None:
    ours = {wire.code for wire in ERROR_MAPPINGS.values() if wire.http >= 500} - {"deadline_exceeded"} | {STOPPED}
    burns = next(rule["expr"] for rule in rules() if rule["alert"] == "MantaErrorBudgetBurnsFast")
    (codes,) = set(re.findall(r'code=~"([^"]*)"', burns))
    assert set(codes.split("|")) == ours


def test_every_alert_says_what_to_do() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"].endswith(".")
        assert len(rule["annotations"]["description"]) > 40


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool here (Debian's package prometheus has it)")
    return found


def test_promtool_finds_the_rules_sound_and_every_alert_fires_only_when_it_should(promtool: str, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": ready("everything").one("PrometheusRule")["spec"]["groups"]}))
    shutil.copy(Path(__file__).parent / "alerts.yaml", tmp_path / "alerts.yaml")
    for command in (("check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"), ("test", "rules", "alerts.yaml")):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_both_ways() -> None:
    cases = yaml.safe_load((Path(__file__).parent / "alerts.yaml").read_text())["tests"]
    tried = [(check["alertname"], bool(check.get("exp_alerts"))) for case in cases for check in case["alert_rule_test"]]
    for rule in rules():
        assert (rule["alert"], True) in tried, f"{rule['alert']} is never seen to fire"
        assert (rule["alert"], False) in tried, f"{rule['alert']} is never seen to be silent"
