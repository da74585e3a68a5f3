"""What must hold of the processes of a replica, whatever they compute. The ranks are real Ray actors without a model."""

import dataclasses
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import ray

from cluster.channel import PrivateFolder
from cluster.config import RankResources, ReplicaConfig
from cluster.errors import StartFailed
from cluster.executor import RayExecutor
from cluster.messages import RankProgress, decode
from cluster.placement_group import ReplicaPlacementGroup
from engine.errors import WorkersLost
from engine.plan import StepPlan, Work
from parallel.topology import Topology
from tests.cluster.conftest import alive, descendants
from tests.cluster.fake_ranks import CRASH, CRASH_AND_RAISE, RAISE, SLEEP, SPIN, FakeRankLauncher

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("own_ray")]

LAUNCHER = FakeRankLauncher(topology=Topology(tp=2))
CONFIG = ReplicaConfig(first_step_timeout_s=60, step_timeout_s=60, start_timeout_s=60)
HASTY = dataclasses.replace(CONFIG, step_timeout_s=3)
"""For tests in which a step is not answered. In any other test a machine that is busy with other things may keep it waiting for longer."""


def plan(step: int, token: int = 1) -> StepPlan:
    return StepPlan(step, (Work(sequence=0, start=0, tokens=(token,), new_blocks=(), samples=True),))


@contextmanager
def executor(
    launcher: FakeRankLauncher = LAUNCHER, config: ReplicaConfig = CONFIG, **callbacks: Callable[..., None]
) -> Iterator[RayExecutor]:
    folder = PrivateFolder()
    resources = RankResources(cpus=1)
    placement_group = ReplicaPlacementGroup.current_or_new(launcher, resources, timeout_s=30)
    made = None
    try:
        made = RayExecutor(
            launcher=launcher, resources=resources, config=config, placement_group=placement_group, folder=folder, **callbacks
        )
        yield made
    finally:
        if made is not None:
            made.close()
        placement_group.close()
        folder.close()


def until(condition: Callable[[], bool], within_s: float = 60.0) -> None:
    """``within_s`` ends a hopeless wait; it is no promise."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.02)


def test_plans_flow_to_all_ranks_and_results_come_back_in_order() -> None:
    progress: list[RankProgress] = []
    with executor(on_progress=progress.append) as ranks:
        assert ranks.capacity.num_blocks == 64
        pending = [ranks.submit(plan(step, step)) for step in range(50)]
        for step, each in enumerate(pending):
            assert each.result().sampled[0].tokens == (step + 1,)
        pids = [place.pid for place in ranks.locations]
        assert set(pids) <= descendants()
    assert {each.rank for each in progress} == {0, 1}
    assert not any(alive(pid) for pid in pids)


def test_a_step_is_answered_by_the_sampling_rank_of_every_shard() -> None:
    topology = Topology(dp=2, pp=2)
    with executor(FakeRankLauncher(topology=topology)) as ranks:
        pending = []
        for step in range(20):
            works = tuple(Work(10 * step + shard, 0, (step,), (), True, shard) for shard in range(2) if step % 3 or shard)
            pending.append((ranks.submit(StepPlan(step, works)), works))
        for step, (each, works) in enumerate(pending):
            sampled = sorted(each.result().sampled, key=lambda answer: answer.sequence)
            assert [(answer.sequence, answer.tokens) for answer in sampled] == [(work.sequence, (step + 1,)) for work in works]


def test_a_killed_rank_is_named_and_seen_even_while_nothing_runs() -> None:
    losses: list[float] = []
    with executor(on_loss=lambda: losses.append(time.monotonic())) as ranks:
        ranks.submit(plan(0)).result()
        victim = ranks.locations[1]
        assert victim.pid in descendants()
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: bool(losses))
        with pytest.raises(WorkersLost, match=rf"rank 1 on {victim.host} \(pid {victim.pid}\)") as caught:
            ranks.submit(plan(1)).result()
        assert (caught.value.rank, caught.value.host) == (1, victim.host)
        assert caught.value.from_outside
    assert not any(alive(place.pid) for place in ranks.locations)


def test_an_exception_in_a_rank_comes_back_with_its_own_traceback() -> None:
    with executor() as ranks:
        with pytest.raises(WorkersLost, match=r"rank 1 .*rank one cannot count") as caught:
            ranks.submit(plan(0, RAISE)).result()
        assert caught.value.rank == 1
        assert "fake_ranks.py" in (caught.value.rank_traceback or "")
        assert not caught.value.from_outside


@pytest.mark.parametrize("command", [CRASH, CRASH_AND_RAISE], ids=["others wait", "others complain"])
def test_a_rank_that_crashes_in_native_code_leaves_word_of_where_it_was(command: int) -> None:
    with executor() as ranks:
        with pytest.raises(WorkersLost, match=r"rank 1 .*Segmentation fault") as caught:
            ranks.submit(plan(0, command)).result()
        assert caught.value.rank == 1
        assert "fake_ranks.py" in (caught.value.rank_traceback or "")
        assert not caught.value.from_outside


def test_a_rank_that_is_told_to_end_was_ended_from_outside() -> None:
    with executor() as ranks:
        ranks.submit(plan(0)).result()
        victim = ranks.locations[1]
        assert victim.pid in descendants()
        os.kill(victim.pid, signal.SIGTERM)
        until(lambda: not alive(victim.pid))
        with pytest.raises(WorkersLost, match="rank 1 ") as caught:
            ranks.submit(plan(1)).result()
        assert caught.value.from_outside


def test_ranks_leave_nothing_in_their_folder() -> None:
    folder = PrivateFolder()
    placement_group = ReplicaPlacementGroup.current_or_new(LAUNCHER, RankResources(), timeout_s=30)
    before = sorted(folder.path.iterdir())
    ranks = RayExecutor(launcher=LAUNCHER, resources=RankResources(), config=CONFIG, placement_group=placement_group, folder=folder)
    with pytest.raises(WorkersLost):
        ranks.submit(plan(0, CRASH)).result()
    ranks.close()
    after = sorted(folder.path.iterdir())
    placement_group.close()
    folder.close()
    assert after == before


def test_a_frozen_rank_is_seen_by_the_deadline_of_the_step() -> None:
    with executor(config=HASTY) as ranks:
        ranks.submit(plan(0)).result()
        victim = ranks.locations[0]
        assert victim.pid in descendants()
        os.kill(victim.pid, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(WorkersLost, match=r"rank 0 .*stopped"):
            ranks.submit(plan(1)).result()
        assert time.monotonic() - begun > 2.5, "not before the deadline"
    assert not alive(victim.pid)


@pytest.mark.parametrize("command", [SPIN, SLEEP])
def test_a_rank_that_hangs_in_native_code_does_not_survive_the_deadline(command: int) -> None:
    with executor(config=HASTY) as ranks:
        ranks.submit(plan(0)).result()
        with pytest.raises(WorkersLost, match="step 1"):
            ranks.submit(plan(1, command)).result()
    assert not any(alive(place.pid) for place in ranks.locations)


def test_a_rank_that_cannot_start_is_named_with_its_reason_and_leaves_nothing() -> None:
    before = descendants()
    with pytest.raises(StartFailed, match="no such shard"), executor(FakeRankLauncher(topology=Topology(tp=2), fails_to_start=1)):
        pass
    assert not {pid for pid in descendants() - before if "Worker" in " ".join(_command(pid))}


def test_what_a_look_at_the_hosts_finds_missing_is_said_before_any_rank_loads() -> None:
    launcher = FakeRankLauncher(topology=Topology(tp=2), missing="there is no /models/x/config.json", fails_to_start=0)
    with (
        pytest.raises(StartFailed, match=rf"{socket.gethostname()}: the checkpoint cannot be opened.*there is no /models/x"),
        executor(launcher),
    ):
        pass


def test_a_rank_that_ends_just_after_it_was_opened_is_a_failed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> int:
        raise ProcessLookupError(f"no process {pid}")

    monkeypatch.setattr(os, "pidfd_open", gone)
    with pytest.raises(StartFailed, match=r"rank 0 on .* is not there any more"), executor():
        pass


def test_a_rank_that_cannot_be_understood_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with executor() as ranks:
        assert ranks.submit(plan(0)).result().step == 0
        monkeypatch.setattr("cluster.executor.decode", lambda raw: decode(raw[:-1]))
        with pytest.raises(WorkersLost, match="malformed StepResult") as raised:
            ranks.submit(plan(1)).result()
        assert raised.value.rank == 0


def _command(pid: int) -> list[str]:
    import psutil

    try:
        return psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return []


def test_new_ranks_start_on_the_ground_of_the_old() -> None:
    folder = PrivateFolder()
    placement_group = ReplicaPlacementGroup.current_or_new(LAUNCHER, RankResources(), timeout_s=30)
    settings = {"launcher": LAUNCHER, "resources": RankResources(), "config": CONFIG, "placement_group": placement_group, "folder": folder}
    first = RayExecutor(**settings)
    os.kill(first.locations[0].pid, signal.SIGKILL)
    with pytest.raises(WorkersLost):
        first.submit(plan(0)).result()
    first.close()
    second = RayExecutor(**settings)
    assert second.submit(plan(1)).result().step == 1
    second.close()
    placement_group.close()
    folder.close()


@ray.remote(num_cpus=0)
class Owner:
    """Stands for a replica's process."""

    def begin(self) -> list[int]:
        self.folder = PrivateFolder()
        self.placement_group = ReplicaPlacementGroup.current_or_new(LAUNCHER, RankResources(), timeout_s=30)
        self.ranks = RayExecutor(
            launcher=LAUNCHER, resources=RankResources(), config=CONFIG, placement_group=self.placement_group, folder=self.folder
        )
        self.ranks.submit(plan(0)).result()
        return [os.getpid(), *(place.pid for place in self.ranks.locations)]

    def hang(self, command: int) -> None:
        self.ranks.submit(plan(1, command))


@pytest.mark.parametrize("command", [None, SPIN, SLEEP])
def test_ranks_do_not_outlive_a_killed_replica_whatever_they_are_doing(command: int | None) -> None:
    owner = Owner.remote()
    replica, *ranks = ray.get(owner.begin.remote())
    assert {replica, *ranks} <= descendants()
    if command is not None:
        ray.get(owner.hang.remote(command))
        time.sleep(0.2)
    os.kill(replica, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in ranks))
