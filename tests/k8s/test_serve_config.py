"""The settings that the chart writes are settings that Manta and Ray Serve take."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.autoscaling import AutoscalingConfig
from serve.config import ServeConfig
from serve.config_sources import load
from serve.grpc.server import SERVICER_FUNCTIONS
from serve.proxy_hook import SLOW_CLIENT_TIMEOUT_S, variables
from tests.k8s.chart import CHART, KINDS, READY, environment, ready, with_values


def settings(name: str, folder: Path) -> ServeConfig:
    file = folder / "manta.yaml"
    file.write_text(ready(name).one("ConfigMap", "manta")["data"]["manta.yaml"])
    return load(file=file).config


@pytest.mark.parametrize("name", [*READY, *KINDS])
def test_the_config_map_is_a_settings_file(name: str, tmp_path: Path) -> None:
    config = settings(name, tmp_path)
    assert [entry.model.name for entry in config.models]
    assert config.replica.other_hosts, "fronts are on other hosts than replicas"


def test_an_adapter_is_found_on_its_claim(tmp_path: Path) -> None:
    (entry,) = settings("everything", tmp_path).models
    assert (entry.model.source, entry.model.adapter) == ("/claims/weights/Qwen2-7B-Instruct", "/claims/adapters/my-lora")
    for template in ready("everything").pods().values():
        mounted = {
            volume["persistentVolumeClaim"]["claimName"] for volume in template["spec"]["volumes"] if "persistentVolumeClaim" in volume
        }
        assert {"weights", "adapters"} <= mounted


@pytest.mark.parametrize("name", [*READY, *KINDS])
def test_ray_serve_takes_the_serve_config(name: str) -> None:
    schema = ServeDeploySchema.model_validate(ready(name).serve_config)
    (application,) = schema.applications
    assert application.import_path == "serve.app:app"
    assert schema.grpc_options.grpc_servicer_functions == list(SERVICER_FUNCTIONS)
    assert (schema.http_options.port, schema.grpc_options.port) == (8000, 9000)


@pytest.mark.parametrize("name", [*READY, *KINDS])
def test_the_application_gets_the_settings_of_the_file_but_for_the_proxies(name: str) -> None:
    file = yaml.safe_load(ready(name).one("ConfigMap", "manta")["data"]["manta.yaml"])
    args = ready(name).serve_config["applications"][0]["args"]
    for section in file:
        if section not in ("http", "grpc"):
            assert args[section] == file[section]
    for section in ("http", "grpc"):
        assert not {"host", "port", "reflection", "certificate", "key", "client_ca"} & args.get(section, {}).keys()


@pytest.mark.parametrize("name", [*READY, *KINDS])
def test_every_pod_of_the_cluster_has_what_the_proxies_need_in_their_environment(name: str, tmp_path: Path) -> None:
    config = settings(name, tmp_path)
    tls, slow_s = config.grpc.tls, config.http.slow_client_timeout_s
    assert any(tls.values()) == (name == "everything")
    assert (slow_s == SLOW_CLIENT_TIMEOUT_S) == (name != "everything")
    for template in ready(name).pods().values():
        given = environment(template)
        address = given.pop("MANTA_PROXY_GRPC_HOST")
        assert address == {"fieldRef": {"fieldPath": "status.podIP"}}, "gRPC listens on the pod's own address only"
        wanted = dict(variables(grpc_host="any", tls=tls, slow_client_timeout_s=slow_s))
        del wanted["MANTA_PROXY_GRPC_HOST"]
        assert wanted.items() <= given.items()


def test_a_model_is_kept_to_the_hosts_of_its_group_and_the_fronts_to_theirs(tmp_path: Path) -> None:
    config = settings("multi-model", tmp_path)
    assert [entry.resources.host_resource for entry in config.models] == ["manta-small", "manta-small", "manta-large"]
    for group in ("small", "large", "front"):
        assert ready("multi-model").group(group)["resources"] == {f"manta-{group}": "1"}
    assert config.fronts.host_resource == "manta-front"


def test_a_replica_on_one_host_is_packed_there_and_one_on_two_is_not(tmp_path: Path) -> None:
    assert settings("qwen2-72b-tp8", tmp_path).models[0].resources.one_host
    assert not settings("qwen2-72b-2hosts", tmp_path).models[0].resources.one_host


def test_ranks_take_gpus_where_the_group_has_some(tmp_path: Path) -> None:
    assert settings("qwen2-7b-1gpu", tmp_path).models[0].resources.gpus == 1
    assert settings("cpu-demo", tmp_path).models[0].resources.gpus == 0


def test_a_replica_drains_as_long_as_a_stream_may_take(tmp_path: Path) -> None:
    assert settings("cpu-demo", tmp_path).replica.drain_timeout_s == 120


def test_settings_of_a_model_win_over_what_the_chart_derives() -> None:
    model = {"name": "m", "source": "hf://a/b", "workerGroup": "gpu", "settings": {"resources": {"cpus": 2}, "engine": {"max_running": 7}}}
    entry = with_values({"models": [model]}).serve_config["applications"][0]["args"]["models"][0]
    assert entry["resources"] == {"gpus": 1, "one_host": True, "host_resource": "manta-gpu", "cpus": 2}
    assert entry["engine"] == {"max_running": 7}


def test_further_settings_reach_the_server() -> None:
    args = with_values({"config": {"limits": {"choices": 2}, "router": {"max_attempts": 5}}}).serve_config["applications"][0]["args"]
    assert args["limits"] == {"choices": 2}
    assert args["router"] == {"max_attempts": 5}


def test_a_claim_that_holds_a_model_is_mounted_where_its_source_then_is() -> None:
    rendered = ready("everything")
    (entry,) = rendered.serve_config["applications"][0]["args"]["models"]
    assert entry["model"]["source"] == "/claims/weights/Qwen2-7B-Instruct"
    for template in rendered.pods().values():
        mounts = {mount["mountPath"]: mount for mount in template["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["/claims/weights"]["readOnly"]


def test_replicas_are_added_and_given_up_between_the_bounds(tmp_path: Path) -> None:
    (entry,) = settings("everything", tmp_path).models
    assert (entry.replicas.least, entry.replicas.initial, entry.replicas.most) == (1, 2, 3)
    assert settings("cpu-demo", tmp_path).models[0].replicas.vary is False


def test_a_model_may_go_to_zero_with_a_policy_of_its_own(tmp_path: Path) -> None:
    model = {"name": "m", "source": "demo", "workerGroup": "gpu", "replicas": {"min": 0, "max": 2}, "autoscaling": {"hold_s": 1800}}
    rendered = with_values({"models": [model]})
    (tmp_path / "manta.yaml").write_text(rendered.one("ConfigMap", "manta")["data"]["manta.yaml"])
    (entry,) = load(file=tmp_path / "manta.yaml").config.models
    assert (entry.replicas.least, entry.replicas.initial, entry.replicas.most) == (0, 0, 2)
    assert entry.autoscaling.hold_s == 1800


def test_the_chart_knows_the_settings_of_the_policy() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["definitions"]["model"]["properties"]["autoscaling"]
    assert set(schema["properties"]) == {field.name for field in dataclasses.fields(AutoscalingConfig)}
