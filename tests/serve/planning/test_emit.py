"""What a plan writes is what the server and the chart take."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cluster.placement import bundles, strategy
from serve.config_sources import load
from serve.planning.emit import config_yaml, helm_yaml
from serve.planning.plan import Plan, make_plan
from tests.serve.planning.plan_inputs import ask


@pytest.fixture(scope="module", params=[("Qwen2-57B-A14B", "8xH100-80G", 2), ("Qwen2-7B-Instruct", "3x24G", 1)], ids=str)
def plan(request: pytest.FixtureRequest) -> Plan:
    model, gpus, hosts = request.param
    return make_plan(ask(model, gpus, hosts=hosts))


def test_every_layout_is_written_as_settings_that_the_server_loads(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "manta.yaml"
    for layout in plan.layouts[:20]:
        file.write_text(config_yaml(layout, plan.inputs))
        config = load(file=file).config
        assert config.parallel.topology == layout.topology
        assert config.replicas.count == layout.placement.replicas
        assert config.model.source == plan.inputs.shape.name
        assert config.engine.max_step_tokens == plan.inputs.workload.step_tokens
        assert config.engine.max_running == layout.running
        assert config.runner.max_context_tokens == plan.inputs.workload.context_tokens
        assert (config.runner.dtype, config.resources.gpus) == ("bfloat16", 1.0)
        assert config.resources.one_host == (layout.placement.hosts_per_replica == 1)
        assert config.ray.address == (None if plan.inputs.fleet.hosts == 1 else "auto")


def test_the_server_asks_ray_for_the_hosts_that_were_planned(plan: Plan, tmp_path: Path) -> None:
    file = tmp_path / "manta.yaml"
    for layout in plan.layouts:
        file.write_text(config_yaml(layout, plan.inputs))
        resources = load(file=file).config.resources
        gpus = [bundle.get("GPU", 0) for bundle in bundles(layout.topology, resources)[1:]]
        if layout.placement.hosts_per_replica > 1:
            assert gpus == [layout.placement.gpus_per_host] * layout.placement.hosts_per_replica
        else:
            assert (sum(gpus), strategy(resources)) == (layout.topology.size, "STRICT_PACK")


def test_experts_that_are_held_twice_are_a_setting(tmp_path: Path) -> None:
    made = make_plan(replace(ask("Qwen2-57B-A14B", "8xH100-80G", hosts=2), redundant_experts=1))
    file = tmp_path / "manta.yaml"
    file.write_text(config_yaml(made.layouts[0], made.inputs))
    assert load(file=file).config.runner.redundant_experts == 1
    (model,) = yaml.safe_load(helm_yaml(made.layouts[0], made.inputs))["models"]
    assert model["settings"]["runner"]["redundant_experts"] == 1


def test_a_layout_that_is_not_served_yet_says_so_on_top(plan: Plan) -> None:
    for layout in plan.layouts:
        assert ("NOT SERVED TODAY" in config_yaml(layout, plan.inputs)) != layout.is_served_today


def test_the_values_name_a_worker_group_with_the_gpus_of_all_ranks(plan: Plan) -> None:
    for layout in plan.layouts:
        values = yaml.safe_load(helm_yaml(layout, plan.inputs))
        (model,), (group,) = values["models"], values["workerGroups"]
        assert model["workerGroup"] == group["name"]
        assert all(re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) for name in (model["name"], group["name"]))
        assert group["gpusPerHost"] * group["hostsPerReplica"] == layout.topology.size
        assert model["replicas"] == {"min": group["min"], "max": group["max"], "initial": layout.placement.replicas}
        assert model["source"].startswith("hf://Qwen/Qwen2-")
        parallel = model["parallel"]
        assert parallel["tensor"] * parallel["data"] * parallel["pipeline"] == layout.topology.size
