"""Whose KV lies in the memory of one host."""

from typing import Any

from serve.config import ServeConfig
from serve.replicas_per_host import max_replicas_per_host

HOSTS = [{"CPU": 64.0, "kind": 1.0, "GPU": 8.0}, {"CPU": 4.0}]


def served(**sections: Any) -> ServeConfig:
    return ServeConfig.model_validate(sections)


def test_every_model_on_cpus_that_may_be_on_the_host_counts() -> None:
    chat, embedding = served(replicas={"count": 3}), served(replicas={"min": 0, "max": 2})
    assert max_replicas_per_host(chat, [chat], HOSTS) == 3
    assert max_replicas_per_host(chat, [chat, embedding], HOSTS) == 5
    assert max_replicas_per_host(chat, [chat, embedding], [{"CPU": 2.0}]) == 4, "two of each, as far as CPUs go"


def test_models_on_gpus_and_on_hosts_of_another_kind_do_not_share() -> None:
    here, there = (served(replicas={"count": 2}, resources={"host_resource": kind}) for kind in ("kind", "other"))
    on_gpus = served(replicas={"count": 8}, resources={"gpus": 1})
    assert max_replicas_per_host(here, [here, there, on_gpus], HOSTS) == 2
    assert max_replicas_per_host(on_gpus, [here, there, on_gpus], HOSTS) == 1
