"""Pod Security's restricted profile, and what contract and sense ask besides; every exception by name, with its reason."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.k8s.chart import KINDS, READY, ready

ALL = [*READY, *KINDS]

MAY_LOCK_MEMORY = {("qwen2-72b-2hosts", "pair-4x80g"), ("kueue", "pair")}
"""RDMA registers memory, for which verbs need IPC_LOCK; only groups that ask for it by rdma.ipcLock have it."""
MAY_MOUNT_THE_HOST = {("kueue", "pair")}
"""cache.type hostPath is for clusters without a shared file system; the folder is one of the models' own."""
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


def pod_specs(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield from ((group, template["spec"]) for group, template in ready(name).pods().items())
    for each in ready(name).objects:
        if each["kind"] == "Pod":
            yield each["metadata"]["name"], each["spec"]
        elif each["kind"] == "Job":
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]
        elif each["kind"] == "RayJob":
            yield "submitter", each["spec"]["submitterPodTemplate"]["spec"]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec["containers"], *spec.get("initContainers", [])]


@pytest.mark.parametrize("name", ALL)
def test_pods_are_as_the_restricted_profile_wants_them(name: str) -> None:
    for pod, spec in pod_specs(name):
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 10_000
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        kinds = {key for volume in spec["volumes"] for key in volume if key != "name"}
        assert kinds - VOLUMES <= ({"hostPath"} if (name, pod) in MAY_MOUNT_THE_HOST else set())


@pytest.mark.parametrize("name", ALL)
def test_containers_have_no_more_than_they_need(name: str) -> None:
    for pod, spec in pod_specs(name):
        for one in containers(spec):
            security = one["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"]["drop"] == ["ALL"]
            added = set(security["capabilities"].get("add", []))
            assert added <= ({"IPC_LOCK"} if (name, pod) in MAY_LOCK_MEMORY else set())
            assert "hostPort" not in str(one.get("ports"))


@pytest.mark.parametrize("name", ALL)
def test_the_autoscaler_beside_the_head_is_no_exception(name: str) -> None:
    if options := ready(name).cluster.get("autoscalerOptions"):
        assert options["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 10001,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        }


@pytest.mark.parametrize("name", ALL)
def test_whatever_ray_writes_to_is_a_volume(name: str) -> None:
    for _, spec in pod_specs(name):
        for one in containers(spec):
            assert "/tmp" in [mount["mountPath"] for mount in one["volumeMounts"]]
            assert {"name": "HOME", "value": "/tmp"} in one["env"]


@pytest.mark.parametrize("name", ALL)
def test_only_the_autoscaler_has_a_key_to_the_cluster(name: str) -> None:
    for pod, spec in pod_specs(name):
        if pod == "head" and ready(name).cluster["enableInTreeAutoscaling"]:
            assert "serviceAccountName" not in spec, "KubeRay makes one with the rights that the autoscaler needs"
        else:
            assert spec["automountServiceAccountToken"] is False
    for account in ready(name).all("ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not ready(name).kinds & {"Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"}


@pytest.mark.parametrize("name", ALL)
def test_every_container_says_what_it_needs(name: str) -> None:
    for _, spec in pod_specs(name):
        for one in containers(spec):
            assert {"cpu", "memory"} <= one["resources"]["requests"].keys()
            assert "memory" in one["resources"]["limits"], "a leak ends one pod, not the node"
