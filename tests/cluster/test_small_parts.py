"""Placement, health, recovery and directory: parts that need no process."""

from types import SimpleNamespace

import pytest

from cluster.canary import Canary
from cluster.channel import Address
from cluster.config import RankResources, ReplicaConfig, RouterConfig
from cluster.directory import Reader, Register, ReplicaRecord
from cluster.errors import RecoveryGivenUp, StartFailed
from cluster.health import Health, StartProgressTracker, State
from cluster.placement import HOST_RESOURCE_SHARE, bundle_of, bundles, cpus_needed, most_on_a_host, on_hosts_with, strategy
from cluster.recovery import Recovery, RestartBudget
from cluster.worker_handles import WorkerHandle, start_workers
from engine.errors import EngineStopped, WorkersLost
from engine.output import EngineOutput
from engine.plan import TokenEvent
from engine.request import Request
from parallel.topology import Topology


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- placement


@pytest.mark.parametrize(
    ("topology", "resources", "counts"),
    [
        (Topology(tp=2, dp=2), RankResources(cpus=3, gpus=1), [2, 2]),
        (Topology(tp=2, pp=2), RankResources(cpus=3, gpus=1), [2, 2]),
        (Topology(tp=3, dp=2, ep=3), RankResources(cpus=3, gpus=1), [6]),  # an expert is shared by two ranks, the attention by three
        (Topology(tp=1, dp=4, ep=4), RankResources(cpus=3, gpus=1), [1, 1, 1, 1]),
        (Topology(tp=16), RankResources(cpus=3, gpus=1, ranks_per_host=8), [8, 8]),
        (Topology(tp=3), RankResources(cpus=3, gpus=1, ranks_per_host=2), [2, 1]),
        (Topology(tp=2, pp=2), RankResources(cpus=3, gpus=1, ranks_per_host=4), [4]),
    ],
)
def test_a_replica_has_a_bundle_for_itself_and_one_for_each_set_of_ranks_that_must_share_a_host(topology, resources, counts) -> None:
    made = bundles(topology, resources)
    assert made == [{"CPU": 0.5}, *({"CPU": 3 * count, "GPU": count} for count in counts)]
    where = [bundle_of(rank, topology, resources) for rank in range(topology.size)]
    assert where == [1 + index for index, count in enumerate(counts) for _ in range(count)]
    assert cpus_needed(topology, resources) == 0.5 + 3 * topology.size


def test_ranks_without_gpus_ask_for_none() -> None:
    assert "GPU" not in bundles(Topology(), RankResources())[1]


def test_all_ranks_lie_on_one_host_only_when_asked_to() -> None:
    assert strategy(RankResources(one_host=True)) == "STRICT_PACK"
    assert strategy(RankResources()) == "PACK"


def test_every_bundle_asks_for_the_kind_of_host_that_is_wanted() -> None:
    made = bundles(Topology(tp=2), RankResources(gpus=1, host_resource="h100"))
    assert {bundle["h100"] for bundle in made} == {HOST_RESOURCE_SHARE}
    assert on_hosts_with(None) == {}


@pytest.mark.parametrize(
    ("most", "topology", "hosts", "wanted"),
    [
        (1, Topology(tp=2), [4.0], 1),
        (5, Topology(tp=2), [4.0], 2),
        (5, Topology(tp=2), [4.0, 64.0], 5),  # all of them may lie on the large one
        (5, Topology(tp=2, pp=2), [4.0, 4.0], 2),
        (3, Topology(tp=2), [1.0], 3),  # there is no host for any yet: whatever comes may be large
    ],
)
def test_replicas_share_a_host_as_far_as_its_cpus_allow(most: int, topology: Topology, hosts: list[float], wanted: int) -> None:
    others = [{"CPU": 128.0}, {"node": 1.0}]
    resources = RankResources(host_resource="kind")
    assert most_on_a_host(most, [*({"CPU": cpus, "kind": 1.0} for cpus in hosts), *others], topology, resources) == wanted


def test_ranks_that_were_started_are_known_where_a_later_one_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are to be ended."""
    workers: list[WorkerHandle] = []

    def socket(name: str) -> str:
        if name.endswith("-1"):
            raise OSError("no place is left for sockets")
        return name

    actors = SimpleNamespace(options=lambda **_options: SimpleNamespace(remote=lambda rank: f"actor {rank}"))
    monkeypatch.setattr("cluster.worker_handles.ray.remote", lambda _class: actors)
    folder, context = SimpleNamespace(socket=socket), SimpleNamespace(socket=lambda _kind: None)
    launcher, placement_group = SimpleNamespace(topology=Topology(tp=2)), SimpleNamespace(group=None)
    with pytest.raises(OSError, match="no place"):
        start_workers(workers, launcher, RankResources(), placement_group, folder, context)  # type: ignore[arg-type]
    assert [worker.actor for worker in workers] == ["actor 0"]


@pytest.mark.parametrize("bad", [{"step_timeout_s": 0}, {"max_restarts": -1}, {"heartbeat_s": -1.0}])
def test_invalid_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        ReplicaConfig(**bad)  # type: ignore[arg-type]


def test_a_replica_must_be_allowed_more_silence_than_there_is_between_two_pings() -> None:
    with pytest.raises(ValueError, match="ping_s"):
        RouterConfig(replica_silence_s=1.0, ping_s=1.0)


# --- health


def test_a_replica_is_ready_only_after_a_canary() -> None:
    health = Health()
    assert not health.ready
    assert health.record_canary(health.generation)
    assert health.ready


def test_a_canary_from_before_a_loss_proves_nothing() -> None:
    health = Health()
    before = health.generation
    after = health.mark_lost("rank 1 died")
    assert not health.record_canary(before)
    assert not health.ready
    assert health.record_canary(after)


def test_a_host_that_took_the_ranks_with_it_is_named_until_they_are_back() -> None:
    health = Health()
    health.mark_lost("a rank ended", announced=False)
    assert not health.ranks_lost, "nobody leaves before the engine has said whose step it was"
    health.mark_lost("rank 1 on gpu-7 was lost", host="gpu-7")
    assert health.ranks_lost
    health.mark_lost("a rank ended")
    assert health.lost_host == "gpu-7"
    assert health.record_canary(health.generation)
    health.mark_lost("rank 1 died")
    assert health.lost_host is None


def test_a_failed_replica_never_becomes_ready_again() -> None:
    health = Health()
    health.mark_failed("gave up")
    assert not health.record_canary(health.generation)
    health.mark_lost("again")
    assert health.state is State.FAILED


def test_a_draining_replica_stays_so_through_a_loss() -> None:
    health = Health()
    health.mark_draining()
    assert not health.record_canary(health.mark_lost("rank 0 died"))
    assert health.state is State.DRAINING


def test_a_suspect_replica_is_ready_again_with_its_next_token() -> None:
    health = Health()
    health.record_canary(health.generation)
    health.mark_suspect("no canary token for 5 s")
    assert not health.ready
    assert health.record_canary(health.generation)
    assert health.ready


def test_a_start_is_as_far_as_its_slowest_rank() -> None:
    progress = StartProgressTracker(2)
    progress.update(0, "warm_up", 0, 1)
    assert progress.loading.done == 0.0
    progress.update(1, "weights", 50, 100)
    assert progress.loading.doing == "weights"
    assert progress.loading.done == pytest.approx(0.475)
    progress.update(0, "warm_up", 1, 1)
    progress.update(1, "capture", 5, 10)
    assert progress.loading.done < 1.0
    progress.update(0, "capture", 10, 10)
    progress.update(1, "capture", 10, 10)
    assert progress.loading.done == 1.0


def test_the_canary_is_asked_once_per_generation_and_keeps_its_events_to_itself() -> None:
    health, sent = Health(), list[Request]()
    canary = Canary(health, sent.append)
    canary.send()
    canary.send()
    assert len(sent) == 1
    health.mark_lost("rank 0 died")
    canary.send()
    assert len(sent) == 2
    stale = TokenEvent(sent[0].id, 0, 0, 0, (1,), finish_reason="length")
    assert canary.consume(EngineOutput([stale, TokenEvent("client", 0, 0, 0, (5,))])) == [TokenEvent("client", 0, 0, 0, (5,))]
    assert not health.ready
    canary.consume(EngineOutput([TokenEvent(sent[1].id, 0, 0, 0, (1,), finish_reason="length")]))
    assert health.ready
    assert canary.pending_s == 0.0


def test_a_canary_that_failed_is_no_proof() -> None:
    health, sent = Health(), list[Request]()
    canary = Canary(health, sent.append)
    canary.send()
    canary.consume(EngineOutput([TokenEvent(sent[0].id, 0, 0, 0, finish_reason="error", error_kind="PoisonedRequest")]))
    assert not health.ready
    canary.send()
    assert len(sent) == 2


def test_a_replica_whose_ranks_have_no_numbers_for_a_canary_is_not_ready_until_they_have() -> None:
    health, sent = Health(), list[Request]()
    canary = Canary(health, sent.append)
    assert health.record_canary(health.generation)
    canary.send()
    canary.consume(EngineOutput([TokenEvent(sent[-1].id, 0, 0, 0, finish_reason="error", error_kind="InvalidLogits")]))
    assert not health.ready
    assert "no numbers" in health.reason
    canary.send()
    canary.consume(EngineOutput([TokenEvent(sent[-1].id, 0, 0, 0, (1,), finish_reason="length")]))
    assert health.ready


def test_a_canary_that_found_the_queue_full_makes_nobody_doubt() -> None:
    health, sent = Health(), list[Request]()
    canary = Canary(health, sent.append)
    assert health.record_canary(health.generation)
    canary.send()
    canary.consume(EngineOutput([TokenEvent(sent[-1].id, 0, 0, 0, finish_reason="error", error_kind="QueueFull")]))
    assert health.ready


def refusal(request: Request) -> TokenEvent:
    return TokenEvent(request.id, 0, 0, 0, finish_reason="error", error_kind="QueueFull")


def test_with_a_full_queue_a_clients_token_is_the_proof_that_a_refused_canary_could_not_be() -> None:
    health, sent = Health(), list[Request]()
    canary = Canary(health, sent.append)
    health.mark_lost("rank 0 died")
    canary.send()
    old = TokenEvent("client", 0, 0, 0, (5,))
    canary.consume(EngineOutput([refusal(sent[0]), old]))
    assert not health.ready, "a token of the ranks that were lost proves nothing"
    canary.note_restart()
    canary.consume(EngineOutput([TokenEvent("client", 0, 0, 1, finish_reason="cancelled")]))
    assert not health.ready, "an end without a token proves nothing"
    canary.consume(EngineOutput([TokenEvent("client", 0, 0, 1, (6,))]))
    assert health.ready
    health.mark_lost("rank 1 died")
    canary.consume(EngineOutput([TokenEvent("client", 0, 0, 2, (7,))]))
    assert not health.ready


def test_an_engine_that_has_stopped_is_sent_no_canary_and_that_is_no_error() -> None:
    def stopped(request: Request) -> None:
        raise EngineStopped("this engine has stopped")

    canary = Canary(Health(), stopped)
    canary.send()
    assert canary.pending_s == 0.0


# --- recovery


class FakeExecutor:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


def test_restarts_wait_longer_each_time_and_then_run_out() -> None:
    clock = Clock()
    budget = RestartBudget(max_restarts=3, window_s=60, backoff_s=0.5, clock=clock)
    assert [budget.take() for _ in range(4)] == [0.0, 0.5, 1.0, None]
    clock.now += 61
    assert budget.take() == 0.0


def test_a_loss_ends_the_old_ranks_before_new_ones_start() -> None:
    old, new, slept = FakeExecutor(), FakeExecutor(), list[float]()

    def start() -> FakeExecutor:
        assert old.closed
        return new

    recovery = Recovery(start, ReplicaConfig(), sleep=slept.append)  # type: ignore[arg-type]
    loss = WorkersLost("rank 1 on h was lost", rank=1, host="h", rank_traceback="Traceback: boom")
    assert recovery.restore(old, loss) is new  # type: ignore[arg-type, comparison-overlap]
    assert recovery.num_restarts == 1
    (post_mortem,) = recovery.post_mortems
    assert (post_mortem.rank, post_mortem.host) == (1, "h")
    assert "boom" in str(post_mortem)


def test_ranks_that_do_not_start_are_tried_until_the_budget_is_spent() -> None:
    slept = list[float]()

    def start() -> FakeExecutor:
        raise StartFailed("no room")

    recovery = Recovery(start, ReplicaConfig(max_restarts=3, restart_backoff_s=0.5), sleep=slept.append, clock=Clock())  # type: ignore[arg-type]
    with pytest.raises(RecoveryGivenUp, match="no room"):
        recovery.restore(FakeExecutor(), WorkersLost("rank 0 died"))  # type: ignore[arg-type]
    assert slept == [0.0, 0.5, 1.0]


def test_ranks_that_nobody_wants_any_more_are_not_tried_again() -> None:
    slept = list[float]()

    def start() -> FakeExecutor:
        raise EngineStopped("the replica is being stopped")

    recovery = Recovery(start, ReplicaConfig(max_restarts=3), sleep=slept.append, clock=Clock())  # type: ignore[arg-type]
    with pytest.raises(EngineStopped):
        recovery.restore(FakeExecutor(), WorkersLost("rank 0 died"))  # type: ignore[arg-type]
    assert slept == [0.0]


# --- directory


def record(id: str, state: State = State.READY) -> ReplicaRecord:
    return ReplicaRecord(id=id, model="m", state=state, address=Address(node="n", ipc=f"ipc:///{id}"))


def test_a_replica_that_stops_reporting_is_taken_off() -> None:
    clock = Clock()
    register = Register(expiry_s=10, clock=clock)
    register.report(record("a"))
    clock.now += 8
    register.report(record("b"))
    clock.now += 3
    assert [each.id for each in register.records()[1]] == ["b"]
    register.leave("b")
    assert register.records()[1] == ()


def test_a_directory_that_begins_anew_does_not_make_readers_forget() -> None:
    clock = Clock()
    reader = Reader("app")
    register = Register(expiry_s=10, clock=clock)
    register.report(record("a"))
    clock.now += 11
    register.report(record("a"))
    reader.take(*register.records())
    restarted = Register(expiry_s=10, clock=clock)
    reader.take(*restarted.records())
    assert [each.id for each in reader.known] == ["a"]
    clock.now += 11
    reader.take(*restarted.records())
    assert reader.known == ()


def test_a_note_on_a_topic_vanishes_unless_it_is_renewed() -> None:
    clock = Clock()
    register = Register(expiry_s=10, clock=clock)
    register.pin("metrics", "front-1", "one")
    clock.now += 8
    register.pin("metrics", "front-2", "two")
    assert register.pinned("metrics") == {"front-1": "one", "front-2": "two"}
    clock.now += 4
    assert register.pinned("metrics") == {"front-2": "two"}
    assert register.pinned("another") == {}
