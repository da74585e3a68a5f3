"""A replica with real ranks that hold a tiny random Qwen2: tokens flow, and every loss is outlived."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.config import ReplicaConfig
from cluster.directory import ReplicaRecord, current_records
from cluster.replica import Replica
from cluster.worker import ModelRankLauncher
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.run.settings import RunnerConfig
from parallel.topology import Topology
from tests.cluster.conftest import alive, descendants
from tests.cluster.fakes import eventually
from tests.cluster.fronts import answer, front

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("own_ray")]

ENGINE = EngineConfig(max_step_tokens=64)
CONFIG = ReplicaConfig(first_step_timeout_s=60, step_timeout_s=10, heartbeat_s=0.2, drain_timeout_s=2, canary_every_s=1)
GREEDY = Request(id="greedy", prompt=tuple(range(5, 45)), sampling=SamplingParams(temperature=0.0, max_tokens=200))
SAMPLED = Request(id="sampled", prompt=(9, 8, 7), sampling=SamplingParams(temperature=1.0, seed=11, max_tokens=200))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def new_replica(checkpoint: Path, *, id: str, app: str) -> Replica:
    runner = RunnerConfig(device="cpu", dtype="float32", num_threads=1, kv_cache_bytes=2**21)
    launcher = ModelRankLauncher(checkpoint_folder=checkpoint, topology=Topology(tp=2), runner_config=runner, engine_config=ENGINE)
    return Replica(id=id, app=app, model="tiny", launcher=launcher, engine_config=ENGINE, config=CONFIG)


@contextmanager
def running(checkpoint: Path, app: str) -> Iterator[Replica]:
    replica = new_replica(checkpoint, id=f"{app}-1", app=app)
    replica.start()
    try:
        yield replica
    finally:
        replica.close(drain=False)


def kill(pid: int) -> None:
    assert pid in descendants(), "victims are chosen among our own only"
    os.kill(pid, signal.SIGKILL)


def groups_in_use() -> int:
    return sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values())


async def test_a_killed_rank_is_a_pause_to_the_clients_and_is_told_by_name(checkpoint: Path) -> None:
    before, groups, segments = descendants(), groups_in_use(), set(os.listdir("/dev/shm"))
    with running(checkpoint, "rank") as replica:
        async with front("rank") as router:
            undisturbed = [await answer(router, request) for request in (GREEDY, SAMPLED)]
            victim = replica.record().ranks[1]
            readiness: list[bool] = []

            def strike(position: int) -> None:
                if position == 20 and alive(victim.pid):
                    kill(victim.pid)

            watching = asyncio.create_task(_watch(replica, readiness))
            disturbed = await asyncio.gather(answer(router, GREEDY, strike), answer(router, SAMPLED))
            assert disturbed == undisturbed
            await eventually(lambda: replica.health.ready and readiness[-1])
            watching.cancel()
            assert [state for index, state in enumerate(readiness) if index == 0 or state != readiness[index - 1]] == [True, False, True]
            assert router.resumes.counts.resumes.total() == 0
        told = replica.record()
        assert told.num_restarts == 1
        assert f"rank 1 on {victim.host} (pid {victim.pid})" in (told.last_loss or "")
        assert victim.pid not in {rank.pid for rank in told.ranks}
        ranks = [rank.pid for rank in told.ranks]
    assert not any(alive(pid) for pid in ranks)
    await eventually(lambda: groups_in_use() == groups)
    left = set(os.listdir("/dev/shm")) - segments  # with those of tests beside this one, which come and go
    await eventually(lambda: left.isdisjoint(os.listdir("/dev/shm")))
    assert {pid for pid in descendants() - before if _is_worker(pid)} == set()
    assert [each.id for each in current_records("rank")] == []


async def _watch(replica: Replica, readiness: list[bool]) -> None:
    while True:
        readiness.append(replica.health.ready)
        await asyncio.sleep(0.005)


async def test_a_rank_killed_while_nothing_runs_is_restored_before_anybody_asks(checkpoint: Path) -> None:
    with running(checkpoint, "idle") as replica:
        kill(replica.record().ranks[0].pid)
        await eventually(lambda: not replica.health.ready)
        await eventually(lambda: replica.health.ready)
        async with front("idle") as router:
            assert len(await answer(router, GREEDY)) == 200


def test_a_rank_killed_before_there_is_an_engine_is_restored(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is announced while nobody can be asked for a token yet."""
    replica, kills = new_replica(checkpoint, id="early-1", app="early"), []

    def late_engine(executor: Any, *given: Any, **named: Any) -> Engine:
        kills.append(executor.locations[0].pid)
        kill(kills[0])
        while not replica.health.generation:
            time.sleep(0.01)
        time.sleep(0.2)  # what follows in the watcher's thread
        return Engine(executor, *given, **named)

    monkeypatch.setattr("cluster.replica.Engine", late_engine)
    try:
        replica.start()
        assert replica.health.ready
        assert replica.record().num_restarts == len(kills) == 1
    finally:
        replica.close(drain=False)


async def test_a_rank_frozen_while_nothing_runs_makes_the_replica_not_ready(checkpoint: Path) -> None:
    with running(checkpoint, "frozen") as replica:
        victim = replica.record().ranks[1].pid
        assert victim in descendants()
        os.kill(victim, signal.SIGSTOP)
        await eventually(lambda: not replica.health.ready)
        await eventually(lambda: replica.health.ready)
        assert not alive(victim)
        assert "stopped" in (replica.record().last_loss or "")


@ray.remote(num_cpus=0, max_concurrency=4)
class Host:
    """A process for a replica, as Ray Serve has one."""

    def __init__(self, checkpoint: Path, id: str, app: str) -> None:
        self.replica = new_replica(checkpoint, id=id, app=app)
        self.replica.start()

    def record(self) -> ReplicaRecord:
        return self.replica.record()


async def test_a_killed_replica_is_replaced_by_another_in_the_middle_of_a_stream(checkpoint: Path) -> None:
    hosts: list[Any] = [Host.remote(checkpoint, f"pair-{number}", "pair") for number in range(2)]
    records: list[ReplicaRecord] = ray.get([host.record.remote() for host in hosts])
    async with front("pair") as router:
        await eventually(lambda: sum(link.ready for link in router._links.values()) == 2)
        undisturbed = await answer(router, GREEDY)
        struck: list[ReplicaRecord] = []

        def strike(position: int) -> None:
            if position == 20:
                (link,) = (link for link in router._links.values() if link.num_streams)  # type: ignore[attr-defined]
                struck.append(link.record)
                kill(link.record.pid)

        assert await answer(router, GREEDY, strike) == undisturbed
        assert router.resumes.counts.resumes.total() == 1
        (lost,) = [record for record in records if record.id == struck[0].id]
        await eventually(lambda: not any(alive(rank.pid) for rank in lost.ranks))
    for host in hosts:
        ray.kill(host)
    await eventually(lambda: not any(alive(rank.pid) for record in records for rank in record.ranks))
    await eventually(lambda: not any(alive(record.pid) for record in records))


def _is_worker(pid: int) -> bool:
    import psutil

    try:
        return "Worker" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False
