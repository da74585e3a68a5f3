"""Builds Manta's image for CPU without a daemon: buildah in chroot isolation on a base that debootstrap makes."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("buildah", "debootstrap")
INSIDE = "/mnt/host"
"""Where what pip needs of this machine is during the build: a place that no package of the system touches."""
BASE, IMAGE = "localhost/manta-test-base", "localhost/manta-test"


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


@dataclass(frozen=True)
class Builder:
    """Buildah with a storage of its own, so that what a test makes is one folder."""

    folder: Path

    def run(self, *arguments: str, timeout_s: float = 3600) -> str:
        storage = ("--storage-driver", "vfs", "--root", str(self.folder / "root"), "--runroot", str(self.folder / "run"))
        done = subprocess.run(["buildah", *storage, *arguments], capture_output=True, text=True, check=False, timeout=timeout_s)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def make_base(self) -> None:
        """Debian 12 as debootstrap makes it."""
        rootfs = self.folder / "rootfs"
        if not (rootfs / "etc" / "os-release").exists():
            subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(rootfs)], check=True, capture_output=True, timeout=1800)
        container = self.run("from", "scratch").strip()
        self.run("add", container, str(rootfs), "/")
        self.run("commit", "--rm", container, BASE)

    def build(self) -> None:
        mounts, options = pip_here()
        volumes = [flag for mount in mounts for flag in ("--volume", f"{mount}:{INSIDE}{mount}:ro")]
        self.run(
            "build", "--isolation", "chroot", "--format", "docker", "--layers", "--target", "cpu",
            "--file", str(ROOT / "k8s" / "images" / "Dockerfile"),
            "--ignorefile", str(ROOT / "k8s" / "images" / "Dockerfile.dockerignore"),
            "--build-arg", f"BASE={BASE}", "--build-arg", f"PIP_ARGS={' '.join(options)}", "--build-arg", "EXTRAS=s3",
            *volumes, "--tag", IMAGE, str(ROOT),
        )  # fmt: skip

    def start(self) -> str:
        return self.run("from", IMAGE).strip()

    def run_in(self, container: str, command: Sequence[str], *, mounts: Sequence[str] = (), timeout_s: float = 600) -> str:
        volumes = [flag for mount in mounts for flag in ("--volume", mount)]
        return self.run("run", "--isolation", "chroot", *volumes, container, "--", *command, timeout_s=timeout_s)


def pip_here() -> tuple[list[str], list[str]]:
    """How pip finds packages on this machine: folders and files to mount, and options that say the same inside."""
    told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    mounts, options = set(), []
    for line in told.splitlines():
        name, _, quoted = line.partition("=")
        option = name.rpartition(".")[2].strip(":")
        if option not in ("cert", "constraint", "extra-index-url", "find-links", "index-url"):
            continue
        for value in quoted.strip("'").split():
            path = value.removeprefix("file://localhost").removeprefix("file://")
            if path.startswith("/") and Path(path).exists():
                mounts.add(str(Path(path).parent) if option == "extra-index-url" else path)
                value = value.replace(path, f"{INSIDE}{path}")
            options.append(f"--{option}={value}")
    return sorted(mounts), list(dict.fromkeys(options))
