"""As much of KubeRay's operator and of a kubelet as starts the chart's pods as processes: each pod is a network and a mount namespace.

What is left when the tests are killed is removed by `tests.k8s.pod_remover`.

The `ray start` command, its environment and the volumes are made from the rendered pod as the operator makes them; a pod's address is
real, so is every port. What is missing: images, limits, probes, users.
"""

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil

from tests.processes import kill

ROOT = Path(__file__).parents[2]
NETWORK = "10.213.77"
TRIES = 5
MARK = "MANTA_TEST_PODS"
"""Environment variable that tells the processes of one node's pods."""
Template = dict[str, Any]


def can_start_pods() -> bool:
    return os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("unshare") is not None


def cpus(quantity: str) -> int:
    """A quantity as whole CPUs, rounded up."""
    return -int(-Decimal(quantity.removesuffix("m")) / 1000 // 1) if quantity.endswith("m") else -int(-Decimal(quantity) // 1)


def start_command(group: dict[str, Any], *, head: str | None) -> str:
    """What the operator makes of a group: for workers ``head`` is the host of GCS."""
    resources = group["template"]["spec"]["containers"][0]["resources"]
    params = {**group["rayStartParams"], "metrics-export-port": "8080", "dashboard-agent-listen-port": "52365"}
    params.setdefault("num-cpus", str(cpus(resources["limits"].get("cpu") or resources["requests"]["cpu"])))
    if group.get("resources"):
        amounts = ", ".join(f'"{name}": {amount}' for name, amount in group["resources"].items())
        params["resources"] = shlex.quote(f"{{{amounts}}}")
    if head:
        params["address"] = f"{head}:6379"
    else:
        params |= {"port": "6379", "no-monitor": "true"}
    flags = " ".join(f"--{name}" if value == "true" else f"--{name}={value}" for name, value in params.items())
    return f"ulimit -n 65536 2>/dev/null || true; exec ray start {'' if head else '--head '}{flags}"


@dataclass
class Pod:
    """A started one."""

    name: str
    ip: str
    process: "subprocess.Popen[bytes]"
    log: Path
    environment: dict[str, str]

    def run(self, *command: str, timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
        """As `kubectl exec`: in the pod's network and mounts."""
        inside = ("nsenter", "--target", str(self.process.pid), "--mount", "--net", "--", *command)
        return subprocess.run(inside, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_s)


class Node:
    """A bridge, and pods on it."""

    def __init__(self, folder: Path, token: str, cache: Path) -> None:
        self._folder, self._token, self._cache = folder, token, cache
        self._pods: list[Pod] = []
        self._remover: subprocess.Popen[str] | None = None
        self._number = 1
        self._bridge = f"manta{os.getpid() % 10_000}"
        self._mark = secrets.token_hex(8)

    @contextmanager
    def up(self) -> Iterator["Node"]:
        command = [sys.executable, "-m", "tests.k8s.pod_remover", f"{MARK}={self._mark}", self._bridge]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True, start_new_session=True) as self._remover:
            ip("link", "add", self._bridge, "type", "bridge")
            try:
                ip("address", "add", f"{NETWORK}.1/24", "dev", self._bridge)
                ip("link", "set", self._bridge, "up")
                yield self
            finally:
                for pod in reversed(self._pods):
                    end(pod.process)
        # Popen has closed the pipe and waited: everything else is gone too

    def start(self, name: str, group: dict[str, Any], *, config: str, head: str | None = None) -> Pod:
        """A pod whose Ray runs. One that did not start is made again, as the operator does: on a busy machine Ray may give up."""
        for _ in range(TRIES):
            pod = self._start(name, group, config=config, head=head)
            while pod.process.poll() is None and b"This command will now block" not in pod.log.read_bytes():
                time.sleep(0.5)
            if pod.process.poll() is None:
                return pod
            self._pods.remove(pod)
            ip("netns", "delete", self._namespace(name))
        raise AssertionError(f"{name} did not start in {TRIES} tries: {pod.log.read_text()[-3000:]}")

    def _start(self, name: str, group: dict[str, Any], *, config: str, head: str | None) -> Pod:
        self._number += 1
        address = f"{NETWORK}.{self._number}"
        self._join(name, self._number, address)
        folder = self._folder / f"{name}-{self._number}"
        environment = self._environment(group["template"], address, head or "127.0.0.1", name)
        script = "\n".join((*self._mounts(group["template"], folder, config), start_command(group, head=head)))
        log = folder / "ray.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._namespace(name), "unshare", "--mount", "--", "bash", "-c", script],
                env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        pod = Pod(name, address, process, log, environment)
        self._pods.append(pod)
        return pod

    def _namespace(self, name: str) -> str:
        return f"{self._bridge}-{name}"

    def _join(self, name: str, number: int, address: str) -> None:
        space, outside = self._namespace(name), f"{self._bridge}p{number}"
        ip("netns", "add", space)
        ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", outside, "master", self._bridge, "up")
        ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        ip("-n", space, "link", "set", "lo", "up")
        ip("-n", space, "route", "add", "default", "via", f"{NETWORK}.1")

    def _environment(self, template: Template, address: str, head: str, group: str) -> dict[str, str]:
        """The image's, the operator's, and what the pod says; only fields that the chart uses are known."""
        image = {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/bin",
            "PYTHONPATH": f"{ROOT}:{ROOT}/client/src",
            "LANG": "C.UTF-8",
        }
        operator = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token, "RAY_IP": head, "RAY_PORT": "6379", "RAY_ADDRESS": f"{head}:6379",
            "RAY_NODE_TYPE_NAME": group,
        }  # fmt: skip
        fields = {"status.podIP": address}
        pod = {
            each["name"]: each["value"] if "value" in each else fields[each["valueFrom"]["fieldRef"]["fieldPath"]]
            for each in template["spec"]["containers"][0]["env"]
        }
        return {
            MARK: self._mark,
            **image,
            **operator,
            "OMP_NUM_THREADS": "2",
            "RAY_raylet_start_wait_time_s": "60",
            "RAY_agent_register_timeout_ms": "120000",
            **pod,
        }

    def _mounts(self, template: Template, folder: Path, config: str) -> Iterator[str]:
        """Volumes as binds; the model cache is this machine's, so that nothing is fetched."""
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for mount in sorted(template["spec"]["containers"][0]["volumeMounts"], key=lambda mount: mount["mountPath"]):
            path, volume = mount["mountPath"], volumes[mount["name"]]
            source = folder / mount["name"]
            source.mkdir(parents=True, exist_ok=True)
            if "configMap" in volume:
                (source / "manta.yaml").write_text(config)
            if mount["name"] == "models":
                (source / "manta").mkdir()
                yield f"mount --bind {self._cache} {source}/manta"
            if volume.get("emptyDir", {}).get("medium") == "Memory":
                yield f"mount -t tmpfs -o size={volume['emptyDir']['sizeLimit'].removesuffix('i').lower()} shm {path}"
            else:
                self._make(Path(path))
                yield f"mount --rbind {source} {path}"

    def _make(self, place: Path) -> None:
        """A mount point on this machine, where it has none; removed in the end."""
        missing = [each for each in (place, *place.parents) if not each.exists()]
        assert self._remover is not None
        assert self._remover.stdin is not None
        for each in missing:
            print(each, file=self._remover.stdin, flush=True)
        place.mkdir(parents=True, exist_ok=True)


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    """A pod's end: SIGTERM, a while, SIGKILL for what is left."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
    process.wait(10)
    _, left = psutil.wait_procs(family, timeout=5)
    kill(left)
    psutil.wait_procs(left, timeout=5)
