"""The plain manifests are what the chart renders, and a kustomization takes them."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from k8s.render_manifests import ROOT, SETS, manifests

FOLDER = ROOT / "manifests"


@pytest.mark.parametrize("name", sorted(SETS))
def test_they_are_fresh(name: str) -> None:
    there = {file.name: file.read_text() for file in (FOLDER / name).glob("*.yaml")}
    assert there == manifests(name), "run: python k8s/render_manifests.py"


@pytest.mark.parametrize("name", sorted(SETS))
def test_nothing_in_them_is_of_a_release_or_a_namespace(name: str) -> None:
    for file in (FOLDER / name).glob("*.yaml"):
        each = yaml.safe_load(file.read_text())
        assert "namespace" not in each.get("metadata", {})
        assert "helm.sh/" not in file.read_text()


@pytest.mark.parametrize("name", sorted(SETS))
def test_kubectl_puts_them_together_in_ones_own_namespace(name: str, tmp_path: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here")
    shutil.copytree(FOLDER / name, tmp_path / "base")
    (tmp_path / "kustomization.yaml").write_text("resources: [base]\nnamespace: mine\n")
    done = subprocess.run(["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    assert {each["metadata"]["namespace"] for each in objects} == {"mine"}
    assert len(objects) == len(list((FOLDER / name).glob("*.yaml"))) - 1
