"""What stands beside the cluster: ways in, storage, disruptions, network, monitoring."""

from pathlib import Path
from typing import Any

import yaml

from serve.http.app import create_app
from serve.service_api import ServiceApi
from tests.k8s.chart import container, ready, with_values

Labels = dict[str, str]


def labels_of(name: str, group: str) -> Labels:
    return ready(name).pods()[group]["metadata"]["labels"]


def selects(selector: Labels, labels: Labels) -> bool:
    return selector.items() <= labels.items()


def test_the_service_leads_to_the_fronts_and_to_nobody_else() -> None:
    service = ready("qwen2-7b-1gpu").one("Service", "manta")["spec"]
    assert {port["name"]: port["targetPort"] for port in service["ports"]} == {"http": 8000, "grpc": 9000}
    assert [group for group in ("head", "front", "gpu") if selects(service["selector"], labels_of("qwen2-7b-1gpu", group))] == ["front"]


def test_metrics_are_scraped_in_exactly_one_place() -> None:
    rendered = ready("everything")
    service, monitor = rendered.one("Service", "metrics"), rendered.one("ServiceMonitor")
    assert selects(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])
    assert not selects(monitor["spec"]["selector"]["matchLabels"], rendered.one("Service", "manta")["metadata"]["labels"])
    groups = [group for group in ("head", "front", "gpu") if selects(service["spec"]["selector"], labels_of("everything", group))]
    assert groups == ["head"], "every front answers for the whole server"
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["authorization"]["credentials"] == {"name": "manta-metrics", "key": "key"}
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_rays_own_metrics_are_scraped_on_every_pod() -> None:
    monitor = ready("everything").one("PodMonitor")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    for group, template in ready("everything").pods().items():
        assert selects(monitor["spec"]["selector"]["matchLabels"], labels_of("everything", group))
        assert endpoint["port"] in [port["name"] for port in container(template)["ports"]]


def test_an_ingress_leads_to_http() -> None:
    ingress = ready("everything").one("Ingress")["spec"]
    (rule,) = ingress["rules"]
    assert rule["host"] == "manta.example.com"
    for path in rule["http"]["paths"]:
        assert path["backend"]["service"] == {"name": "manta", "port": {"name": "http"}}
    assert ingress["ingressClassName"] == "nginx"


def test_routes_lead_to_both_fronts_and_let_long_streams_run() -> None:
    rendered = ready("everything")
    (grpc,) = rendered.one("GRPCRoute")["spec"]["rules"]
    assert grpc["backendRefs"] == [{"name": "manta", "port": 9000}]
    asked, told = rendered.one("HTTPRoute")["spec"]["rules"]
    assert asked["timeouts"] == {"request": "660s"}
    assert asked["backendRefs"] == [{"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "manta"}]
    assert told["backendRefs"] == [{"name": "manta", "port": 8000}]


def test_without_a_pool_the_route_leads_to_the_service() -> None:
    rendered = with_values({"gateway": {"parentRefs": [{"name": "g"}], "httpRoute": {"enabled": True}}})
    for rule in rendered.one("HTTPRoute")["spec"]["rules"]:
        assert rule["backendRefs"] == [{"name": "manta", "port": 8000}]


def unasked() -> ServiceApi:
    raise AssertionError


async def unasked_page(accept: str) -> tuple[bytes, str]:
    raise AssertionError


def test_the_world_is_shown_what_clients_ask_for_and_no_metrics() -> None:
    rendered = ready("everything")
    (rule,) = rendered.one("Ingress")["spec"]["rules"]
    by_ingress = {path["path"] for path in rule["http"]["paths"]}
    by_route = {match["path"]["value"] for rule in rendered.one("HTTPRoute")["spec"]["rules"] for match in rule["matches"]}
    served = set(create_app(unasked, metrics=unasked_page).openapi()["paths"])
    shown = {path for path in served if any(path == each or path.startswith(f"{each}/") for each in by_ingress)}
    assert by_ingress == by_route
    assert served - shown == {"/metrics", "/livez", "/readyz"}


def test_the_pool_is_made_of_the_fronts() -> None:
    pool = ready("everything").one("InferencePool")["spec"]
    groups = [group for group in ("head", "front", "gpu") if selects(pool["selector"]["matchLabels"], labels_of("everything", group))]
    assert groups == ["front"]
    assert pool["endpointPickerRef"]["name"] == "picker"


def test_all_fronts_but_one_stay_during_disruptions() -> None:
    budget = ready("everything").one("PodDisruptionBudget", "front")["spec"]
    assert budget["minAvailable"] == 2
    assert selects(budget["selector"]["matchLabels"], labels_of("everything", "front"))


def test_a_budget_says_numbers_for_kubernetes_cannot_take_parts_of_such_pods() -> None:
    for budget in ready("everything").all("PodDisruptionBudget"):
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert "maxUnavailable" not in budget["spec"]
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow", "who serves nobody keeps no node from being drained"


def test_a_group_that_may_be_empty_has_no_budget() -> None:
    assert not ready("qwen2-7b-1gpu").all("PodDisruptionBudget", "gpu")
    assert ready("everything").one("PodDisruptionBudget", "gpu")["spec"]["minAvailable"] == 1


def test_a_budget_counts_replicas_for_only_the_host_of_an_engine_is_ever_ready() -> None:
    """Kubernetes counts Ready pods. Hosts that hold ranks alone have no proxy, for which KubeRay's probe asks."""
    group = {"name": "gpu", "gpusPerHost": 1, "hostsPerReplica": 2, "max": 2}
    model = {"name": "m", "source": "demo", "workerGroup": "gpu", "parallel": {"pipeline": 2}}
    two = with_values({"workerGroups": [{**group, "min": 2}], "models": [{**model, "replicas": {"min": 2}}]})
    assert two.one("PodDisruptionBudget", "gpu")["spec"]["minAvailable"] == 1
    assert not with_values({"workerGroups": [{**group, "min": 1}], "models": [model]}).all("PodDisruptionBudget", "gpu")


def test_the_cache_is_a_claim_that_outlives_the_release() -> None:
    rendered = ready("everything")
    claim = rendered.one("PersistentVolumeClaim")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["storageClassName"] == "shared"
    volumes = {volume["name"]: volume for volume in rendered.group("gpu")["template"]["spec"]["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_a_claim_that_exists_is_used_and_none_made() -> None:
    rendered = with_values({"cache": {"type": "pvc", "existingClaim": "mine"}})
    assert "PersistentVolumeClaim" not in rendered.kinds
    volumes = {volume["name"]: volume for volume in rendered.group("gpu")["template"]["spec"]["volumes"]}
    assert volumes["models"] == {"name": "models", "persistentVolumeClaim": {"claimName": "mine"}}


def test_a_job_fetches_and_examines_the_models_into_the_same_cache() -> None:
    rendered = ready("everything")
    job = rendered.one("Job")["spec"]["template"]
    assert container(job)["command"] == ["manta", "doctor", "--config", "/etc/manta/config/manta.yaml", "--checkpoint-only"]
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in job["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    assert rendered.one("PersistentVolumeClaim")["metadata"]["name"] in claims


def test_another_set_of_models_makes_another_job_as_jobs_cannot_be_changed() -> None:
    changed = with_values({"image": {"digest": "sha256:" + "1" * 64}}, base="everything")
    assert changed.one("Job")["metadata"]["name"] != ready("everything").one("Job")["metadata"]["name"]
    assert with_values({"service": {"httpPort": 80}}, base="everything").one("Job") == ready("everything").one("Job")


def test_or_every_gpu_pod_fetches_them_before_ray_starts() -> None:
    rendered = ready("kueue")
    (first,) = rendered.group("pair")["template"]["spec"]["initContainers"]
    assert first["command"][:2] == ["manta", "doctor"]
    assert "initContainers" not in rendered.group("front")["template"]["spec"]
    two = with_values({"cache": {"type": "hostPath", "download": "init"}}, base="multi-model")
    for group, models in {"small": ["qwen2-0.5b", "qwen2-7b"], "large": ["qwen2-57b-a14b"]}.items():
        (first,) = two.group(group)["template"]["spec"]["initContainers"]
        settings = yaml.safe_load(two.one("ConfigMap", "manta")["data"][Path(first["command"][3]).name])
        assert [model["model"]["name"] for model in settings["models"]] == models, "a host fetches what it serves"
    volumes = {volume["name"]: volume for volume in rendered.group("pair")["template"]["spec"]["volumes"]}
    assert volumes["models"]["hostPath"]["path"] == "/var/lib/manta/models"


def policy(name: str, ends: str) -> dict[str, Any]:
    return ready(name).one("NetworkPolicy", ends)["spec"]


def ports_open_to(spec: dict[str, Any], peer: dict[str, Any]) -> set[int]:
    return {port["port"] for rule in spec["ingress"] if peer in rule["from"] for port in rule["ports"]}


def test_clients_reach_the_fronts_and_nothing_else() -> None:
    namespace = {"podSelector": {}}
    assert ports_open_to(policy("qwen2-7b-1gpu", "front"), namespace) == {8000, 9000}
    for ends in ("manta", "head"):
        assert not any(namespace in rule["from"] for rule in policy("qwen2-7b-1gpu", ends)["ingress"])


def test_only_the_operator_reaches_the_dashboard_which_can_run_code() -> None:
    head = policy("qwen2-7b-1gpu", "head")
    (rule,) = (rule for rule in head["ingress"] if {"port": 8265, "protocol": "TCP"} in rule["ports"])
    assert rule["from"][0]["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "kuberay-operator"}


def test_pods_reach_each_other_names_and_what_is_listed() -> None:
    egress = policy("everything", "manta")["egress"]
    assert egress[0]["to"][0]["podSelector"]["matchLabels"] == {
        "app.kubernetes.io/instance": "manta",
        "app.kubernetes.io/part-of": "manta",
    }
    assert [port["port"] for port in egress[-1]["ports"]] == [443, 6443, 6379, 4318]


def test_names_are_asked_for_of_the_clusters_dns_and_of_a_cache_on_the_node() -> None:
    (names,) = (rule for rule in policy("qwen2-7b-1gpu", "manta")["egress"] if {"port": 53, "protocol": "UDP"} in rule.get("ports", []))
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in names["to"]
    mine = [{"podSelector": {"matchLabels": {"app": "dns"}}}]
    rendered = with_values({"networkPolicy": {"dns": mine}})
    assert mine in [rule.get("to") for rule in rendered.one("NetworkPolicy", "manta")["spec"]["egress"]]


def test_every_pod_is_under_a_policy_both_ways() -> None:
    spec = policy("everything", "manta")
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    for group in ready("everything").pods():
        assert selects(spec["podSelector"]["matchLabels"], labels_of("everything", group))


def test_tls_and_api_keys_are_mounted_and_named_in_the_settings() -> None:
    rendered = ready("everything")
    mounts = {mount["mountPath"] for mount in container(rendered.group("front")["template"])["volumeMounts"]}
    assert {"/etc/manta/tls", "/etc/manta/keys"} <= mounts
    settings = yaml.safe_load(rendered.one("ConfigMap", "manta")["data"]["manta.yaml"])
    assert settings["auth"] == {"keys_file": "/etc/manta/keys/keys.json"}
    assert settings["grpc"]["certificate"] == "/etc/manta/tls/tls.crt"
    assert settings["grpc"]["client_ca"] == "/etc/manta/tls/ca.crt"


def test_the_test_pod_chats_over_http_and_grpc_through_the_service() -> None:
    pod = ready("multi-model").one("Pod", "test-chat")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert container(pod)["args"] == [
        "--http=http://manta:8000",
        "--grpc=grpc://manta:9000",
        "--model=qwen2-0.5b",
        "--model=qwen2-7b",
        "--model=qwen2-57b-a14b",
    ]
    assert "--grpc=grpcs://manta:9000" in container(ready("everything").one("Pod", "test-chat"))["args"]


def test_further_objects_may_be_templates() -> None:
    assert ready("everything").one("ConfigMap", "extra")["data"] == {"release": "manta"}
