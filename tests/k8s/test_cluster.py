"""The Ray cluster of the chart: head, fronts and GPU hosts."""

import re

import pytest

from tests.k8s.chart import READY, ROOT, Refused, container, environment, ready, with_values

GPU = "nvidia.com/gpu"


@pytest.mark.parametrize("name", READY)
def test_the_head_has_no_room_for_replicas(name: str) -> None:
    assert ready(name).cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert ready(name).one("RayService")["spec"]["excludeHeadPodFromServeSvc"] is True


def test_a_group_has_the_gpus_of_its_hosts() -> None:
    resources = container(ready("qwen2-72b-tp8").group("node-8x80g")["template"])["resources"]
    assert resources["limits"][GPU] == resources["requests"][GPU] == 8


def test_another_makers_gpus_are_asked_for_by_their_name() -> None:
    assert container(ready("volcano").group("gpu")["template"])["resources"]["limits"]["amd.com/gpu"] == 1


def test_a_group_without_gpus_asks_for_none() -> None:
    assert GPU not in container(ready("cpu-demo").group("cpu")["template"])["resources"]["limits"]


def test_a_replica_over_two_hosts_makes_two_pods_that_come_and_go_together() -> None:
    group = ready("qwen2-72b-2hosts").group("pair-4x80g")
    assert group["numOfHosts"] == 2
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 1)


def test_hosts_of_one_replica_talk_by_rdma_and_nccl_is_told_how() -> None:
    pod = ready("qwen2-72b-2hosts").group("pair-4x80g")["template"]
    assert container(pod)["resources"]["limits"]["rdma/hca_shared_devices_a"] == 1
    assert environment(pod)["NCCL_IB_HCA"] == "mlx5"
    assert container(pod)["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}


@pytest.mark.parametrize(("name", "group", "size"), [("qwen2-72b-tp8", "node-8x80g", "32Gi"), ("cpu-demo", "cpu", "1Gi")])
def test_shared_memory_is_in_memory_and_counted(name: str, group: str, size: str) -> None:
    volumes = {volume["name"]: volume for volume in ready(name).group(group)["template"]["spec"]["volumes"]}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": size}


@pytest.mark.parametrize("name", READY)
def test_rays_object_store_leaves_shared_memory_to_nccl(name: str) -> None:
    cluster = ready(name).cluster
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert int(group["rayStartParams"]["object-store-memory"]) == 256 << 20
        (size,) = (volume["emptyDir"]["sizeLimit"] for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shm")
        assert int(size.removesuffix("Gi")) >= 1


def test_models_may_share_a_gpu_or_take_none() -> None:
    group = {"name": "gpu", "gpusPerHost": 1, "min": 1, "max": 1}
    half = {"source": "demo", "workerGroup": "gpu", "settings": {"resources": {"gpus": 0.5}}}
    none = {"source": "demo", "workerGroup": "gpu", "replicas": {"min": 3, "max": 3}, "settings": {"runner": {"device": "cpu"}}}
    models = [{"name": "a", **half}, {"name": "b", **half}, {"name": "c", **none}]
    assert with_values({"workerGroups": [group], "models": models}).group("gpu")["maxReplicas"] == 1
    with pytest.raises(Refused, match=r"need 1\.5 GPUs for their replicas\.min together"):
        with_values({"workerGroups": [group], "models": [*models, {"name": "d", **half}]})


def test_hosts_are_given_back_after_their_groups_own_time() -> None:
    rendered = ready("multi-model")
    assert rendered.cluster["autoscalerOptions"]["version"] == "v2"
    assert rendered.group("large")["idleTimeoutSeconds"] == 1800
    assert "idleTimeoutSeconds" not in rendered.group("small")
    assert rendered.cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 600


def test_a_group_may_scale_to_zero() -> None:
    rendered = with_values({"workerGroups": [{"name": "gpu", "gpusPerHost": 1, "min": 0, "max": 4}]})
    assert (rendered.group("gpu")["minReplicas"], rendered.group("gpu")["maxReplicas"]) == (0, 4)


def test_nothing_but_rays_autoscaler_changes_the_number_of_hosts() -> None:
    for name in READY:
        assert not ready(name).kinds & {"HorizontalPodAutoscaler", "ScaledObject"}


@pytest.mark.parametrize("name", READY)
def test_pods_drain_longer_than_the_longest_stream(name: str) -> None:
    rendered = ready(name)
    longest = rendered.serve_config["applications"][0]["args"]["replica"]["drain_timeout_s"]
    assert rendered.one("RayService")["spec"]["rayClusterDeletionDelaySeconds"] > longest
    for group, template in rendered.pods().items():
        assert template["spec"]["terminationGracePeriodSeconds"] > longest
        command = container(template)["lifecycle"]["preStop"]["exec"]["command"]
        how = {"head": ["--last"], "front": []}.get(group, ["--leave"])
        assert command == ["/opt/manta/k8s/images/drain", str(longest), *how]


def test_gcs_outlives_the_head_in_redis_with_the_password_from_a_secret() -> None:
    assert ready("everything").cluster["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis:6379",
        "externalStorageNamespace": "manta",
        "redisUsername": {"value": "ray"},
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}},
    }


def test_gcs_outlives_the_head_on_a_volume() -> None:
    assert ready("kueue").cluster["gcsFaultToleranceOptions"] == {"backend": "rocksdb", "storage": {"size": "1Gi"}}


def test_without_fault_tolerance_nothing_is_said_of_it() -> None:
    assert "gcsFaultToleranceOptions" not in ready("qwen2-7b-1gpu").cluster


def test_every_process_of_ray_proves_itself_by_a_token() -> None:
    assert ready("qwen2-7b-1gpu").cluster["authOptions"] == {"mode": "token"}
    assert ready("everything").cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert "authOptions" not in ready("kueue").cluster


def test_the_first_start_has_a_long_budget() -> None:
    probe = container(ready("qwen2-72b-tp8").group("node-8x80g")["template"])["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600


def test_a_front_is_ready_when_it_would_answer() -> None:
    probe = container(ready("qwen2-7b-1gpu").group("front")["template"])["readinessProbe"]
    assert probe["httpGet"] == {"path": "/readyz", "port": 8000}


def test_nothing_of_a_batchs_cluster_waits_for_what_its_job_deploys() -> None:
    """KubeRay submits the job when all pods are Ready; fronts that wait for the models which it deploys would never be."""
    for template in ready("batch").pods().values():
        assert "readinessProbe" not in container(template)


def test_ready_hosts_of_replicas_are_left_to_kuberays_probe_for_which_the_image_has_wget() -> None:
    assert "readinessProbe" not in container(ready("qwen2-7b-1gpu").group("gpu")["template"])
    (system,) = re.findall(r"install -y --no-install-recommends (.*python3 .*) ", (ROOT / "k8s" / "images" / "Dockerfile").read_text())
    assert "wget" in system.split()


def test_fronts_are_rather_not_on_one_node() -> None:
    affinity = ready("qwen2-7b-1gpu").group("front")["template"]["spec"]["affinity"]
    (preference,) = affinity["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    labels = ready("qwen2-7b-1gpu").group("front")["template"]["metadata"]["labels"]
    assert preference["podAffinityTerm"]["labelSelector"]["matchLabels"].items() <= labels.items()


def test_ones_own_affinity_of_fronts_is_taken_instead() -> None:
    mine = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}
    assert with_values({"front": {"affinity": mine}}).group("front")["template"]["spec"]["affinity"] == mine


def test_kueue_admits_the_cluster_and_keeps_a_replicas_hosts_in_one_rack() -> None:
    rendered = ready("kueue")
    assert rendered.one("RayService")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "serving"
    annotations = rendered.group("pair")["template"]["metadata"]["annotations"]
    assert annotations == {"kueue.x-k8s.io/podset-required-topology": "topology.kubernetes.io/rack"}


def test_volcano_schedules_the_pods_as_a_gang() -> None:
    assert ready("volcano").one("RayService")["metadata"]["labels"]["volcano.sh/queue-name"] == "serving"


def test_an_incremental_upgrade_says_how_much_it_adds() -> None:
    assert ready("everything").one("RayService")["spec"]["upgradeStrategy"] == {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {"gatewayClassName": "istio", "maxSurgePercent": 25, "stepSizePercent": 25, "intervalSeconds": 30},
    }


def test_large_models_are_not_doubled_by_an_upgrade_unless_one_says_so() -> None:
    for name in ("qwen2-72b-tp8", "qwen2-72b-2hosts", "qwen2-57b-a14b-ep8"):
        assert ready(name).one("RayService")["spec"]["upgradeStrategy"] == {"type": "None"}


def test_traces_go_where_one_says() -> None:
    args = ready("everything").serve_config["applications"][0]["args"]
    assert args["tracing"] == {"otlp_endpoint": "http://collector:4318/v1/traces", "ratio": 0.1}
    assert "tracing" not in ready("cpu-demo").serve_config["applications"][0]["args"]


def test_the_token_of_the_hub_comes_from_a_secret() -> None:
    given = environment(ready("everything").group("gpu")["template"])
    assert given["HF_TOKEN"] == {"secretKeyRef": {"name": "hub", "key": "token"}}


def test_a_token_among_the_values_is_put_into_a_secret_and_nowhere_else() -> None:
    rendered = ready("kueue")
    assert rendered.one("Secret")["stringData"] == {"huggingface-token": "a-token-in-the-values"}
    assert rendered.text.count("a-token-in-the-values") == 1
