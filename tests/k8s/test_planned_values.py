"""What `manta plan --emit helm` writes, the chart takes as it is."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.placement import bundles
from serve.cli import app
from serve.config_sources import from_tree, merge_entries
from tests.k8s.chart import container, from_file


@pytest.mark.parametrize(
    ("model", "flags", "gpus", "hosts"),
    [
        ("Qwen2-7B-Instruct", ["--gpus", "1xL4"], 1, 1),
        ("Qwen2-72B-Instruct", ["--gpus", "8xH100-80G"], 8, 1),
        ("Qwen2-57B-A14B-Instruct", ["--gpus", "8xA100-80G"], 8, 1),
        ("Qwen2-72B-Instruct", ["--gpus", "4xA100-80G", "--hosts", "2"], 4, 2),
        ("Qwen2-57B-A14B-Instruct", ["--gpus", "8xA100-40G", "--hosts", "2", "--redundant-experts", "1"], 8, 2),
    ],
)
def test_it_is_rendered_unchanged(model: str, flags: list[str], gpus: int, hosts: int, tmp_path: Path) -> None:
    planned = CliRunner().invoke(app, ["plan", model, *flags, "--emit", "helm"])
    assert planned.exit_code == 0, planned.output
    (tmp_path / "values.yaml").write_text(planned.stdout)
    rendered = from_file(tmp_path / "values.yaml")
    (group,) = (each for each in rendered.cluster["workerGroupSpecs"] if each["groupName"] != "front")
    assert container(group["template"])["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert group["numOfHosts"] == hosts
    (entry,) = rendered.serve_config["applications"][0]["args"]["models"]
    assert entry["model"]["source"] == f"hf://Qwen/{model}"
    assert entry["resources"]["host_resource"] == f"manta-{group['groupName']}"
    (served,) = merge_entries(from_tree(rendered.serve_config["applications"][0]["args"], "args")).config.each_model()
    asked = bundles(served.parallel.topology, served.resources)[1:]
    assert sum(bundle["GPU"] for bundle in asked) == gpus * hosts
    assert hosts == 1 or [bundle["GPU"] for bundle in asked] == [gpus] * hosts
