"""Generate k8s/manifests/ from the chart, for `kubectl apply -k`: `python k8s/render_manifests.py`. A test compares."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # also run as a script

from k8s.fetch_helm import helm

ROOT = Path(__file__).parent
SETS = {
    "cpu-demo": ROOT / "chart" / "values" / "cpu-demo.yaml",
    "qwen2-7b-1gpu": ROOT / "chart" / "values" / "qwen2-7b-1gpu.yaml",
    "batch": ROOT / "chart" / "ci" / "batch-values.yaml",
}
"""Folder to the values file that it is rendered from."""
OF_HELM = ("helm.sh/chart", "app.kubernetes.io/managed-by")
HEAD = (
    "# Written by `python k8s/render_manifests.py` from {values}: do not edit, change the chart or patch it in a kustomization of yours.\n"
)


def manifests(name: str) -> dict[str, str]:
    """File name to content of one set: one object per file, and a kustomization."""
    values = SETS[name]
    head = HEAD.format(values=values.relative_to(ROOT.parent).as_posix())
    files = {f"{_file(each)}.yaml": head + _dump(each) for each in _objects(values)}
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(files),
    }
    return {**files, "kustomization.yaml": head + _dump(kustomization)}


def _objects(values: Path) -> Iterator[dict[str, Any]]:
    command = [str(helm("3")), "template", "manta", str(ROOT / "chart"), "--no-hooks", "--values", str(values)]
    with tempfile.TemporaryDirectory() as home:
        environment = {"HOME": home, **{f"HELM_{place}_HOME": home for place in ("CACHE", "CONFIG", "DATA")}}
        text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout  # noqa: S603  (our own Helm)
    for each in yaml.safe_load_all(text):
        if each:
            del each["metadata"]["namespace"]
            for label in OF_HELM:
                each["metadata"]["labels"].pop(label, None)
            yield each


def _file(each: dict[str, Any]) -> str:
    ending = each["metadata"]["name"].removeprefix("manta")
    return f"{each['kind'].lower()}{ending}"


class _Dumper(yaml.SafeDumper):
    """Indents lists, and writes multi-line text as blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


def _dump(tree: dict[str, Any]) -> str:
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=140)
    return text


def main() -> None:
    for name in SETS:
        folder = ROOT / "manifests" / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.yaml"):
            old.unlink()
        for file, text in manifests(name).items():
            (folder / file).write_text(text)


if __name__ == "__main__":
    main()
