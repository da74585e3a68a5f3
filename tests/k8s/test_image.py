"""The image for CPU, built for real and run: as nobody, with a root that cannot be written to."""

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.demo_model import ensure_demo_model
from tests.k8s.image import IMAGE, Builder, missing_tools

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def builder() -> Builder:
    if missing := missing_tools():
        pytest.skip(f"no {' and no '.join(missing)} here (Debian's packages of these names)")
    builder = Builder(Path("/var/tmp/manta-image"))  # kept between runs: a build takes long, and its layers are used again
    builder.folder.mkdir(parents=True, exist_ok=True)
    builder.make_base()
    builder.build()
    return builder


@pytest.fixture
def container(builder: Builder) -> Iterator[str]:
    made = builder.start()
    yield made
    builder.run("rm", made)


def test_it_is_run_as_nobody_and_serves_by_name(builder: Builder) -> None:
    config = json.loads(builder.run("inspect", "--type", "image", IMAGE))["OCIv1"]["config"]
    assert config["User"] == "10001:10001"
    assert set(config["ExposedPorts"]) == {"8000/tcp", "9000/tcp"}
    assert "Entrypoint" not in config, "KubeRay says what is run"


def test_what_kuberays_probes_and_our_drain_run_is_in_it(builder: Builder, container: str) -> None:
    for command in ("bash", "wget", "grep", "awk", "sed", "tr", "head", "timeout", "readlink", "ray"):
        assert builder.run_in(container, ["bash", "-c", f"command -v {command}"]).strip(), command


def test_its_versions_are_those_of_the_project(builder: Builder, container: str) -> None:
    script = "import ray, torch, manta_client, serve.app; print(ray.__version__, torch.version.cuda)"
    assert builder.run_in(container, ["python3", "-c", script]).split() == ["2.60.0", "None"]
    assert builder.run_in(container, ["manta", "--version"]).startswith("manta ")


def test_it_brings_our_kernels_for_the_processor_that_it_finds_itself_on(builder: Builder, container: str) -> None:
    """It has no compiler, and its user can write nowhere beside its sources."""
    imports = "from parallel.native.library import native; from parallel.native.variants import usable_variants"
    script = f"{imports}; print(native(), usable_variants()[0])"
    found, best = builder.run_in(container, ["python3", "-c", script]).strip().rsplit(maxsplit=1)
    assert found == f"<Native {best}>"


def test_nothing_of_it_can_be_written_by_the_user_it_runs_as(builder: Builder, container: str) -> None:
    elsewhere = " ".join(f"-not -path '{path}'" for path in ("/proc/*", "/dev/*", "/tmp*", "/models*"))
    script = f"find / -xdev -writable {elsewhere} -not -type l -printf '%p\\n'"
    allowed = {"/run/lock", "/var/tmp", "/var/lock"}
    found = set(builder.run_in(container, ["bash", "-c", f"{script} 2>/dev/null || true"]).split())
    assert not {path for path in found if path not in allowed and not path.startswith(("/sys", "/etc/host", "/etc/resolv", "/run/"))}


def test_a_model_answers_in_it(builder: Builder, container: str, tmp_path: Path) -> None:
    """The commands of `manta serve` and of the chart's test pod, with the demo model from this machine."""
    demo = ensure_demo_model()
    http, grpc = 18_000 + secrets.randbelow(1000), 19_000 + secrets.randbelow(1000)
    serve = f"manta serve /models/demo --name demo --tensor-parallel 2 --http-port {http} --grpc-port {grpc}"
    ask = f"python3 /opt/manta/k8s/images/ask.py --http http://127.0.0.1:{http} --grpc grpc://127.0.0.1:{grpc} --model demo"
    script = f"""
for _ in 1 2 3 4 5; do  # on a busy machine Ray may give up its start
    {serve} > /tmp/serve.log 2>&1 & server=$!
    until grep -q 'Ctrl-C ends it' /tmp/serve.log || ! kill -0 $server; do sleep 1; done
    kill -0 $server && break
done
kill -0 $server || {{ cat /tmp/serve.log; exit 1; }}
{ask}; code=$?
kill -TERM $server; wait $server; exit $code
"""
    said = builder.run_in(container, ["bash", "-c", script], mounts=[f"{demo}:/models/demo:ro"], timeout_s=1200)
    assert "demo over HTTP" in said
    assert "demo over gRPC" in said
