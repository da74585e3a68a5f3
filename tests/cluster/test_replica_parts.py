"""A replica's own threads and its starting of ranks, without Ray and without ranks."""

import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import ReplicaConfig
from cluster.errors import RecoveryGivenUp
from cluster.health import State
from cluster.messages import RankProgress
from cluster.replica import Replica
from engine.config import EngineConfig
from engine.errors import EngineStopped
from parallel.topology import Topology
from tests.cluster.fake_ranks import FakeRankLauncher
from tests.cluster.fakes import eventually


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        monkeypatch.setattr("cluster.replica.ray", SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "n")))
        monkeypatch.setattr("cluster.replica.Reporter", lambda app: SimpleNamespace(report=lambda record: None, leave=lambda id: None))
        made = Replica(
            id="a",
            app="app",
            model="m",
            launcher=FakeRankLauncher(topology=Topology()),
            engine_config=EngineConfig(),
            config=ReplicaConfig(heartbeat_s=0.02, other_hosts=False),
        )
        made._placement_group = SimpleNamespace(close=lambda: None)  # type: ignore[assignment]
        yield made
        made.close(drain=False)


class SlowExecutor:
    """Ranks that begin to load, while something else happens."""

    meanwhile: Callable[[], object]
    made = 0

    def __init__(self, *, on_progress: Callable[[RankProgress], None], **_ignored: Any) -> None:
        SlowExecutor.made += 1
        on_progress(RankProgress(0, "weights", 1, 2))
        type(self).meanwhile()
        on_progress(RankProgress(0, "weights", 2, 2))
        raise AssertionError("loaded to the end")


@pytest.fixture
def slow_executor(monkeypatch: pytest.MonkeyPatch) -> type[SlowExecutor]:
    monkeypatch.setattr("cluster.replica.RayExecutor", SlowExecutor)
    monkeypatch.setattr(SlowExecutor, "made", 0)
    return SlowExecutor


def test_a_stopped_replica_starts_no_ranks(replica: Replica, slow_executor: type[SlowExecutor]) -> None:
    replica.close(drain=False)
    with pytest.raises(EngineStopped):
        replica._start_executor()
    assert slow_executor.made == 0


def test_a_stop_is_seen_while_the_ranks_still_load(
    replica: Replica, slow_executor: type[SlowExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow_executor, "meanwhile", lambda: replica.close(drain=False), raising=False)
    with pytest.raises(EngineStopped):
        replica._start_executor()


async def test_a_heartbeat_that_ends_by_itself_makes_the_replica_one_to_be_replaced(replica: Replica) -> None:
    def broken() -> None:
        raise RuntimeError("no state")

    replica._engine = SimpleNamespace(stats=SimpleNamespace(num_running=0, num_waiting=0, kv_used=0.0), stop=lambda: None)  # type: ignore[assignment]
    replica._check_progress = broken  # type: ignore[method-assign]
    replica._engine_thread = SimpleNamespace(join=lambda timeout: None, is_alive=lambda: False)  # type: ignore[assignment]
    replica._heartbeat_thread.start()
    await eventually(lambda: replica.health.state is State.FAILED)
    with pytest.raises(RecoveryGivenUp, match="heartbeat ended: no state"):
        replica.raise_if_failed()
