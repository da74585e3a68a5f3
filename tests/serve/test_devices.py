"""What a rank computes on where nobody says it."""

from typing import Any

import pytest

from serve.config import ServeConfig
from serve.devices import DeviceMisfit, with_devices


def settings(source: str = "Qwen/Qwen2-7B-Instruct", **sections: Any) -> ServeConfig:
    return ServeConfig.model_validate({"model": {"source": source}, **sections})


def decided(*configs: ServeConfig, num_gpus: float) -> list[tuple[float | None, str]]:
    return [(config.resources.gpus, config.runner.device) for config in with_devices(configs, num_gpus)]


def test_every_rank_gets_a_gpu_where_there_are_enough() -> None:
    assert decided(settings(parallel={"tensor": 2}, replicas={"count": 2}), num_gpus=4) == [(1.0, "auto")]


def test_without_gpus_ranks_compute_on_cpus() -> None:
    assert decided(settings(parallel={"tensor": 2}), num_gpus=0) == [(0.0, "cpu")]


def test_the_demo_model_leaves_gpus_alone_unless_it_is_told_to_use_one() -> None:
    assert decided(settings("demo", parallel={"tensor": 2}), num_gpus=1) == [(0.0, "cpu")]
    assert decided(settings("demo", runner={"device": "cuda"}), num_gpus=1) == [(1.0, "cuda")]


@pytest.mark.parametrize(
    "said", [{"resources": {"gpus": 0.5}}, {"resources": {"gpus": 0}}, {"runner": {"device": "cuda:1"}}, {"runner": {"device": "cpu"}}]
)
def test_what_is_said_stays_as_it_is(said: dict[str, Any]) -> None:
    config = settings(parallel={"tensor": 8}, **said)
    (found,) = with_devices([config], 1)
    assert found.runner.device == config.runner.device
    assert found.resources.gpus == (config.resources.gpus or 0)


def test_more_ranks_than_gpus_are_refused_with_what_would_do() -> None:
    with pytest.raises(DeviceMisfit, match=r"wants 4 GPUs, and there are 2: use fewer ranks .*--set runner.device=cpu"):
        with_devices([settings(parallel={"tensor": 2}), settings(parallel={"tensor": 2})], 2)
    with pytest.raises(DeviceMisfit, match="wants 3 GPUs"):  # what one model was told to take the other cannot have
        with_devices([settings(resources={"gpus": 2}), settings()], 2)


def test_who_says_a_number_of_gpus_may_wait_for_hosts_that_have_them() -> None:
    assert decided(settings(parallel={"tensor": 2}, resources={"gpus": 1}), num_gpus=1) == [(1.0, "auto")]


@pytest.mark.parametrize(("runner", "advice"), [({"quantize": "fp8"}, "--quantize int8"), ({"kv_dtype": "fp8"}, "--kv-dtype")])
def test_a_cpu_is_not_asked_for_fp8(runner: dict[str, Any], advice: str) -> None:
    with pytest.raises(DeviceMisfit, match=advice):
        with_devices([settings(runner=runner)], 0)
    assert decided(settings(runner=runner), num_gpus=1) == [(1.0, "auto")]
