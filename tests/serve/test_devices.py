"""What a rank computes on where nobody says it."""

import logging
from typing import Any

import pytest

from serve.config import ServeConfig
from serve.devices import DeviceError, assign_devices


def settings(source: str = "Qwen/Qwen2-7B-Instruct", **sections: Any) -> ServeConfig:
    return ServeConfig.model_validate({"model": {"source": source}, **sections})


def hosts(num_gpus: float) -> list[dict[str, float]]:
    return [{"CPU": 8.0, "GPU": num_gpus} if num_gpus else {"CPU": 8.0}]


def decided(*configs: ServeConfig, num_gpus: float) -> list[tuple[float | None, str]]:
    return [(config.resources.gpus, config.runner.device) for config in assign_devices(configs, hosts(num_gpus))]


def test_every_rank_gets_a_gpu_where_there_are_enough() -> None:
    assert decided(settings(parallel={"tensor": 2}, replicas={"count": 2}), num_gpus=4) == [(1.0, "auto")]


def test_without_gpus_ranks_compute_on_cpus_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert decided(settings(parallel={"tensor": 2}), num_gpus=0) == [(0.0, "cpu")]
    assert "no host has a GPU: Qwen/Qwen2-7B-Instruct runs on CPUs" in caplog.text


def test_the_demo_model_leaves_gpus_alone_unless_it_is_told_to_use_one(caplog: pytest.LogCaptureFixture) -> None:
    assert decided(settings("demo", parallel={"tensor": 2}), num_gpus=1) == [(0.0, "cpu")]
    assert decided(settings("demo", parallel={"tensor": 2}), num_gpus=0) == [(0.0, "cpu")]
    assert decided(settings("demo", runner={"device": "cuda"}), num_gpus=1) == [(1.0, "cuda")]
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"resources": {"gpus": 0.5}}, (0.5, "auto")),
        ({"resources": {"gpus": 0}}, (0.0, "cpu")),  # Ray would show every rank all GPUs
        ({"runner": {"device": "cuda:1"}}, (0.0, "cuda:1")),
        ({"runner": {"device": "cpu"}}, (0.0, "cpu")),
    ],
)
def test_what_is_said_is_not_weighed_against_what_there_is(said: dict[str, Any], found: tuple[float, str]) -> None:
    assert decided(settings(parallel={"tensor": 8}, **said), num_gpus=1) == [found]


def test_more_ranks_than_gpus_are_refused_with_what_would_do() -> None:
    with pytest.raises(
        DeviceError, match=r"needs 4 GPUs, and there are 2: use fewer ranks .*--set runner.device=cpu.*--set resources.gpus=1"
    ):
        decided(settings(parallel={"tensor": 2}), settings(parallel={"tensor": 2}), num_gpus=2)
    with pytest.raises(DeviceError, match="needs 3 GPUs"):  # what one model was told to take the other cannot have
        decided(settings(resources={"gpus": 2}), settings(), num_gpus=2)
    with pytest.raises(DeviceError, match="no host has a GPU"):
        decided(settings(runner={"device": "cuda"}), num_gpus=0)


def test_replicas_beyond_the_fewest_may_wait_for_hosts() -> None:
    assert decided(settings(parallel={"tensor": 2}, replicas={"min": 1, "max": 4}), num_gpus=2) == [(1.0, "auto")]
    assert decided(settings(parallel={"tensor": 2}, replicas={"min": 0, "max": 4}), num_gpus=2) == [(1.0, "auto")]
    with pytest.raises(DeviceError, match="needs 4 GPUs"):
        decided(settings(parallel={"tensor": 2}, replicas={"min": 2, "max": 4}), num_gpus=2)


def test_only_hosts_that_may_take_a_model_count_for_it() -> None:
    kinds = [{"GPU": 8.0, "h100": 1.0}, {"CPU": 8.0, "plain": 1.0}, {"GPU": 1.0, "l4": 1.0}]
    configs = [settings(resources={"host_resource": kind}) for kind in ("h100", "plain", "l4")]
    assert [config.resources.gpus for config in assign_devices(configs, kinds)] == [1.0, 0.0, 1.0]
    with pytest.raises(DeviceError, match="there is 1"):
        assign_devices([settings(parallel={"tensor": 2}, resources={"host_resource": "l4"})], kinds)


@pytest.mark.parametrize(("runner", "advice"), [({"quantize": "fp8"}, "--quantize int8"), ({"kv_dtype": "fp8"}, "--kv-dtype")])
def test_a_cpu_is_not_asked_for_fp8(runner: dict[str, Any], advice: str) -> None:
    with pytest.raises(DeviceError, match=advice):
        decided(settings(runner=runner), num_gpus=0)
    assert decided(settings(runner=runner), num_gpus=1) == [(1.0, "auto")]
