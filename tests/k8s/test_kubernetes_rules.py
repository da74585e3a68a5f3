"""What an API server and KubeRay's operator would refuse, found here."""

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest

from tests.k8s.chart import KINDS, READY, Rendered, ready

VERSIONS = [f"1.{minor}" for minor in range(31, 38)]
FOREIGN = ("ray.io/", "monitoring.coreos.com/", "gateway.networking.k8s.io/", "inference.networking.k8s.io/")
KUBERAY = Path(__file__).parents[3] / "shared" / "kuberay" / "validate.py"
ALL = [*READY, *KINDS]


def core_objects(rendered: Rendered) -> Iterator[dict[str, Any]]:
    """The objects of Kubernetes' own kinds, and of every pod that KubeRay would make a Pod."""
    yield from (each for each in rendered.objects if not each["apiVersion"].startswith(FOREIGN))
    for group, template in rendered.pods().items():
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": group, **template["metadata"]}, "spec": template["spec"]}
    if rendered.is_batch:
        yield {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "s"},
            "spec": rendered.one("RayJob")["spec"]["submitterPodTemplate"]["spec"],
        }


@pytest.fixture(autouse=True, scope="module")
def _each_schema_is_read_once() -> Iterator[None]:
    """The library reads some MB for every object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", functools.cache(kubernetes_validate.utils.schema_contents))
        yield


def different(names: list[str]) -> list[dict[str, Any]]:
    """Sets of values have much in common; each object once."""
    return list({json.dumps(each, sort_keys=True): each for name in names for each in core_objects(ready(name))}.values())


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_kubernetes_takes_every_object(version: str) -> None:
    for each in different(ALL):
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS[1:-1])
def test_kubernetes_between_the_oldest_and_the_newest_takes_them_too(version: str) -> None:
    for each in different(["everything", "kueue"]):
        kubernetes_validate.validate(each, version, strict=True)


def test_every_foreign_kind_is_one_that_is_known_here() -> None:
    kinds = {each["kind"] for name in ALL for each in ready(name).objects if each["apiVersion"].startswith(FOREIGN)}
    known = {"RayService", "RayJob", "ServiceMonitor", "PodMonitor", "PrometheusRule", "HTTPRoute", "GRPCRoute", "InferencePool"}
    assert kinds == known


@functools.cache
def kuberay() -> ModuleType:
    if not KUBERAY.exists():
        pytest.skip("KubeRay's schemas are not here")
    spec = importlib.util.spec_from_file_location("kuberay_validate", KUBERAY)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ALL)
def test_kuberays_schema_takes_the_ray_service_or_job(name: str) -> None:
    (made,) = (each for each in ready(name).objects if each["apiVersion"].startswith("ray.io/"))
    errors = list(kuberay().validator(made["kind"]).iter_errors(kuberay().without_nulls(made)))
    assert not errors, [error.message for error in errors]


# What only the operator checks, when the object is there already (KubeRay 1.7).


def spec(name: str) -> dict[str, Any]:
    return ready(name).cluster


@pytest.mark.parametrize("name", ALL)
def test_autoscaler_v2_wants_pods_that_are_not_restarted(name: str) -> None:
    for template in ready(name).pods().values():
        assert template["spec"].get("restartPolicy", "Never") == "Never"


@pytest.mark.parametrize("name", ALL)
def test_without_the_autoscaler_every_group_has_both_bounds(name: str) -> None:
    for group in spec(name)["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["maxReplicas"]
        if not spec(name)["enableInTreeAutoscaling"]:
            assert group["minReplicas"] == group["maxReplicas"]
            assert "idleTimeoutSeconds" not in group


@pytest.mark.parametrize("name", ALL)
def test_rays_resources_are_said_in_one_place(name: str) -> None:
    for group in [spec(name)["headGroupSpec"], *spec(name)["workerGroupSpecs"]]:
        params = group["rayStartParams"]
        assert "labels" not in params
        if group.get("resources"):
            assert not {"num-cpus", "num-gpus", "memory", "resources"} & params.keys()


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_set_that_the_operator_sets(name: str) -> None:
    forbidden = {
        "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS", "RAY_gcs_storage", "RAY_gcs_storage_path",
        "RAY_enable_autoscaler_v2", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "KUBERAY_GEN_AUTOSCALER_START_CMD",
    }  # fmt: skip
    for template in ready(name).pods().values():
        for one in template["spec"]["containers"]:
            assert not forbidden & {each["name"] for each in one["env"]}
            assert not {"/data/gcs"} & {mount["mountPath"] for mount in one["volumeMounts"]}
    assert not forbidden & {each["name"] for each in spec(name).get("autoscalerOptions", {}).get("env", [])}
    assert "redis-password" not in spec(name)["headGroupSpec"]["rayStartParams"]
    assert "headService" not in spec(name)["headGroupSpec"]
    assert "upgradeStrategy" not in spec(name), "a RayService's cluster has none of its own"


@pytest.mark.parametrize("name", ALL)
def test_fault_tolerance_is_of_one_kind(name: str) -> None:
    options = spec(name).get("gcsFaultToleranceOptions", {})
    if options.get("backend") == "rocksdb":
        assert not {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"} & options.keys()
        assert not ("claimName" in options["storage"] and {"size", "storageClassName"} & options["storage"].keys())
    else:
        assert "storage" not in options


@pytest.mark.parametrize("name", ALL)
def test_an_incremental_upgrade_has_all_that_it_needs(name: str) -> None:
    if ready(name).is_batch:
        return
    strategy = ready(name).one("RayService")["spec"]["upgradeStrategy"]
    if strategy["type"] == "NewClusterWithIncrementalUpgrade":
        options = strategy["clusterUpgradeOptions"]
        assert spec(name)["enableInTreeAutoscaling"]
        assert options["gatewayClassName"]
        assert 0 <= options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
        assert options["intervalSeconds"] > 0


def test_a_job_has_a_submitter_of_its_own_and_leaves_no_cluster() -> None:
    job = ready("batch").one("RayJob")["spec"]
    assert job["submissionMode"] == "K8sJobMode", "the only one whose submitter can be restricted"
    assert "clusterSelector" not in job
    assert job["shutdownAfterJobFinishes"], "ttlSecondsAfterFinished wants it"


@pytest.mark.parametrize("name", ALL)
def test_tokens_want_a_ray_that_knows_them(name: str) -> None:
    if "authOptions" in spec(name):
        assert tuple(map(int, spec(name)["rayVersion"].split("."))) >= (2, 52, 0)


@pytest.mark.parametrize("name", ALL)
def test_the_head_has_the_port_by_which_kuberay_makes_its_service(name: str) -> None:
    ports = {port["name"]: port["containerPort"] for port in spec(name)["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]}
    assert ports["serve"] == 8000


@pytest.mark.parametrize("name", ALL)
def test_pods_keep_the_labels_by_which_kuberay_finds_the_head(name: str) -> None:
    for template in ready(name).pods().values():
        labels = template["metadata"]["labels"]
        assert not {"app.kubernetes.io/name", "app.kubernetes.io/created-by"} & labels.keys()
        assert not [label for label in labels if label.startswith("ray.io/")]
