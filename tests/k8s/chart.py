"""Renders the chart with a real Helm, each set of values once in a session, and answers questions about what comes out."""

import functools
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from k8s.fetch_helm import helm

Object = dict[str, Any]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s" / "chart"
READY = sorted(path.stem for path in (CHART / "values").glob("*.yaml"))
"""Names of the ready values."""
KINDS = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
"""Names of the values that turn everything on, one way and another."""


def values_file(name: str) -> Path:
    """Of ready values, or of those in ci/."""
    ready = CHART / "values" / f"{name}.yaml"
    return ready if ready.exists() else CHART / "ci" / f"{name}-values.yaml"


@dataclass(frozen=True)
class Refused(Exception):
    """Helm would not render it, and said so."""

    said: str


@dataclass(frozen=True)
class Rendered:
    """All objects of a release."""

    objects: tuple[Object, ...]
    text: str

    def one(self, kind: str, name_ends: str = "") -> Object:
        (found,) = self.all(kind, name_ends)
        return found

    def all(self, kind: str, name_ends: str = "") -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind and each["metadata"]["name"].endswith(name_ends)]

    @property
    def kinds(self) -> set[str]:
        return {each["kind"] for each in self.objects}

    @property
    def is_batch(self) -> bool:
        return "RayJob" in self.kinds

    @property
    def cluster(self) -> Object:
        return self.one("RayJob")["spec"]["rayClusterSpec"] if self.is_batch else self.one("RayService")["spec"]["rayClusterConfig"]

    @property
    def serve_config(self) -> Object:
        batch = self.is_batch and self.one("ConfigMap", "manta")["data"]["serve.yaml"]
        return yaml.safe_load(batch or self.one("RayService")["spec"]["serveConfigV2"])

    def group(self, name: str) -> Object:
        (found,) = (each for each in self.cluster["workerGroupSpecs"] if each["groupName"] == name)
        return found

    def pods(self) -> dict[str, Object]:
        """Pod templates that KubeRay makes pods of, by group."""
        workers = {each["groupName"]: each["template"] for each in self.cluster["workerGroupSpecs"]}
        return {"head": self.cluster["headGroupSpec"]["template"], **workers}


def container(template: Object) -> Object:
    return template["spec"]["containers"][0]


def environment(template: Object) -> dict[str, Any]:
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container(template)["env"]}


@functools.cache
def ready(name: str, major: str = "3") -> Rendered:
    """What ready values, or those in ci/, make."""
    return _template(major, (str(values_file(name)),))


def with_values(changes: Object, *, base: str = "qwen2-7b-1gpu", major: str = "3") -> Rendered:
    """What ``changes`` on top of ready values make."""
    return _with_values(json.dumps(changes, sort_keys=True), base, major)


@functools.cache
def _with_values(changes: str, base: str, major: str) -> Rendered:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(changes)
        file.flush()
        return _template(major, (*((str(values_file(base)),) if base else ()), file.name))


def from_file(file: Path, major: str = "3") -> Rendered:
    """What a file of values alone makes."""
    return _template(major, (str(file),))


def _template(major: str, files: tuple[str, ...], release: str = "manta") -> Rendered:
    flags = [flag for file in files for flag in ("--values", file)]
    done = run_helm(major, "template", release, str(CHART), "--namespace", "serving", *flags)
    if done.returncode:
        raise Refused(done.stderr)
    objects = tuple(each for each in yaml.safe_load_all(done.stdout) if each)
    return Rendered(objects=objects, text=done.stdout)


def run_helm(major: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    with tempfile.TemporaryDirectory() as home:
        places = {f"HELM_{name}_HOME": home for name in ("CACHE", "CONFIG", "DATA")}
        return subprocess.run(
            [str(helm(major)), *arguments], capture_output=True, text=True, check=False, timeout=60, env={**places, "HOME": home}
        )
