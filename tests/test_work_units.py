"""How `make test` divides the tests."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.work_units import FilesAndRay, starts_ray

ROOT = Path(__file__).parents[1]
RAYS_OWN = ("tests/cluster/test_executor.py", "tests/system/test_server.py")
OTHERS = ("tests/test_documents.py", "tests/test_history.py", "tests/engine/test_scheduler.py")


def test_every_file_that_starts_ray_is_known() -> None:
    start = re.compile(r"\b(ray\.init|Cluster|ray_head|serving)\(")
    files = [file.relative_to(ROOT) for file in (ROOT / "tests").rglob("test_*.py") if start.search(file.read_text())]
    assert len(files) > 10
    assert [file for file in files if not starts_ray(str(file))] == []
    assert not any(map(starts_ray, OTHERS))


class Worker:
    shutting_down = False
    gateway = SimpleNamespace(id="a worker")

    def __init__(self) -> None:
        self.given: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.given.extend(indices)

    def shutdown(self) -> None:
        self.shutting_down = True


def test_one_worker_gets_everything_with_ray_and_no_file_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdist.scheduler.loadscope.parse_tx_spec_config", lambda _config: [None, None])
    config: Any = SimpleNamespace(option=SimpleNamespace(loadscopereorder=True))
    workers: list[Any] = [Worker(), Worker()]
    tests = [f"{file}::test_it[{case}]" for file in (*OTHERS, *RAYS_OWN) for case in ("one", "a::b", "c/d", "last")]
    scheduler = FilesAndRay(config)
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, tests)
    scheduler.schedule()
    assert [tests[index].partition("::")[0] for index in workers[0].given] == [file for file in RAYS_OWN for _ in range(4)]
    while len(workers[1].given) < 12:
        done = len(workers[1].given)
        for index in workers[1].given[done - 4 : done]:
            scheduler.mark_test_complete(workers[1], index)
    assert [tests[index] for index in workers[1].given] == tests[:12]
