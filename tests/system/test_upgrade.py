"""What is served is changed in place, without a second set of hosts; a change that cannot start is refused."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.ray_host import RayHost, ray_head
from tests.system.server import eventually, free_ports

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(1500)]

MANTA = (sys.executable, "-m", "serve")
ASKED = {"model": "demo", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def head(demo_folder: Path) -> Iterator[RayHost]:
    with ray_head(num_cpus=3, dashboard=False) as host:  # room for two replicas of one rank, not for a third
        yield host


class Traffic:
    """Asks without a pause, and notes every answer."""

    def __init__(self, port: int) -> None:
        self._url, self._over = f"http://127.0.0.1:{port}/v1/completions", threading.Event()
        self.answers: list[str] = []
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(2)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self) -> None:
        while not self._over.is_set():
            try:
                answer = httpx.post(self._url, json=ASKED, timeout=120)
                self.answers.append(answer.json()["choices"][0]["text"] if answer.status_code == 200 else answer.text)
            except httpx.HTTPError as error:
                self.answers.append(repr(error))


def test_an_upgrade_loses_no_request_and_needs_no_more_room_and_one_that_crashes_is_refused(
    head: RayHost, demo_folder: Path, tmp_path: Path
) -> None:
    http, grpc = free_ports(2)
    settings = (f"http.port={http}", f"grpc.port={grpc}", "model.name=demo", "runner.dtype=float32", "runner.num_threads=1")
    given = [word for setting in (*settings, "runner.kv_cache_bytes=200000000") for word in ("--set", setting)]

    def up(folder: Path, *more: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return head.run(*MANTA, "up", str(folder), "-r", "2", *given, *more, timeout_s=900, check=check)

    def replicas() -> list[dict]:
        return json.loads(head.run(*MANTA, "status", "--json", check=False).stdout)["replicas"]

    up(demo_folder)
    golden = httpx.post(f"http://127.0.0.1:{http}/v1/completions", json=ASKED, timeout=120).json()["choices"][0]["text"]
    old = {replica["id"] for replica in replicas()}
    assert len(old) == 2
    with Traffic(http) as traffic:
        up(demo_folder, "--set", "engine.max_running=7")
        eventually(lambda: len(replicas()) == 2, 60)
        new = {replica["id"] for replica in replicas()}
        assert not new & old
        num_answers = len(traffic.answers)
        eventually(lambda: len(traffic.answers) > num_answers + 4, 60)
    assert set(traffic.answers) == {golden}, [answer for answer in traffic.answers if answer != golden]

    broken = tmp_path / "broken"
    shutil.copytree(demo_folder, broken)
    with Traffic(http) as traffic:
        refused = up(broken, "--set", "runner.kv_cache_bytes=1", check=False)  # the ranks cannot start with so little
        assert refused.returncode == 1
        assert "kv_cache_bytes" in refused.stderr, refused.stderr
        num_answers = len(traffic.answers)
        eventually(lambda: len(traffic.answers) > num_answers + 4, 60)
        assert {replica["id"] for replica in replicas() if replica["state"] == "ready"} & new, "the old version serves on"
        up(demo_folder, "--set", "engine.max_running=8")
    assert set(traffic.answers) == {golden}, [answer for answer in traffic.answers if answer != golden]
