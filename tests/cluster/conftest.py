"""A Ray of the tests' own, with nothing in common with any other on this machine."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def own_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ended with the module: a process has one Ray, and other modules start theirs. Its processes are descendants of this one."""
    import ray

    tmp_path_factory.getbasetemp()  # else pytest's own folder would be made below, and be gone for all tests that follow
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_AUTH_TOKEN_PATH", os.path.join(folder, "no-token"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_raylet_start_wait_time_s", "120")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        ray.init(
            address="local",
            num_cpus=16,
            object_store_memory=100 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
        )
        yield
        ray.shutdown()


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def alive(pid: int) -> bool:
    """Not once it has ended: the kernel reaps the children of raylets, and for a moment such a process is neither a zombie nor gone."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
