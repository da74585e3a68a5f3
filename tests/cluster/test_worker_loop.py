"""How a worker takes plans while its device is still at a step. No Ray: the loop alone, with a rank that is told when it is done."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import zmq

from cluster.errors import ChannelError
from cluster.messages import RankFailed, RankReady, Stop, decode, encode
from cluster.worker import Deadlines, Worker
from engine.executor import Capacity
from engine.plan import StepPlan, StepResult
from engine.step_handle import CompletedStep, message_comes_first

LIMIT_S = 60.0


@dataclass(eq=False)
class AtTheDevice:
    outcome: StepResult | None
    done: threading.Event = field(default_factory=threading.Event)

    def is_done(self) -> bool:
        return self.done.is_set()

    def result(self) -> StepResult | None:
        assert self.done.wait(LIMIT_S)
        return self.outcome


class SlowRank:
    """Its steps are over when the test says so."""

    capacity = Capacity(num_blocks=4, block_tokens=4, max_context_tokens=16)

    def __init__(self) -> None:
        self.begun: list[AtTheDevice] = []
        self.more = threading.Semaphore(0)

    def begin(self, plan: StepPlan) -> AtTheDevice:
        self.begun.append(AtTheDevice(StepResult(plan.step, ())))
        self.more.release()
        return self.begun[-1]


DEADLINES = Deadlines(start_s=LIMIT_S, first_step_s=LIMIT_S, step_s=LIMIT_S)


CALL = {"rendezvous": None, "ranks_on_host": 1, "deadlines": DEADLINES}
"""What a worker is told when it is to serve, but for the ranks."""


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SlowRank, "zmq.Socket[bytes]"]]:
    """A rank behind a worker's loop, and the replica's end of their socket."""
    monkeypatch.setattr("cluster.worker._set_kill_timer", lambda _seconds: None)  # the process's one alarm is pytest's here
    worker, rank = Worker(0), SlowRank()
    here = worker._context.socket(zmq.PAIR)
    worker._socket.bind("inproc://plans")
    here.connect("inproc://plans")
    here.rcvtimeo = int(1000 * LIMIT_S)

    @contextmanager
    def start(**_options: object) -> Iterator[SlowRank]:
        yield rank

    thread = threading.Thread(target=worker._serve, kwargs=CALL | {"launcher": SimpleNamespace(start=start)}, daemon=True)
    thread.start()
    assert isinstance(decode(here.recv()), RankReady)
    yield rank, here
    here.send(encode(Stop()))
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    here.close()
    worker._context.destroy()


def test_a_plan_is_begun_while_the_device_is_at_the_one_before_it(talking: tuple[SlowRank, "zmq.Socket[bytes]"]) -> None:
    rank, replica = talking
    replica.send(encode(StepPlan(7, ())))
    assert rank.more.acquire(timeout=LIMIT_S)
    replica.send(encode(StepPlan(8, ())))
    assert rank.more.acquire(timeout=LIMIT_S), "the second was begun, and nobody has said that the first is over"
    rank.begun[1].done.set()
    rank.begun[0].done.set()
    assert [decode(replica.recv()).step for _ in range(2)] == [7, 8]


def test_a_step_is_answered_when_it_is_over_though_no_other_plan_comes(talking: tuple[SlowRank, "zmq.Socket[bytes]"]) -> None:
    rank, replica = talking
    for step in range(3):
        replica.send(encode(StepPlan(step, ())))
        assert rank.more.acquire(timeout=LIMIT_S)
        rank.begun[-1].done.set()
        assert decode(replica.recv()).step == step


def test_who_has_nothing_under_way_is_told_at_once_that_nothing_comes_first() -> None:
    assert not message_comes_first(CompletedStep(None), lambda: pytest.fail("nobody is asked"))
    assert message_comes_first(AtTheDevice(None), lambda: True)


def test_what_a_step_raised_is_told_before_the_rank_lets_go_of_its_device_and_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is lost may not let go, or only with an error of its own."""
    alarms: list[float] = []
    monkeypatch.setattr("cluster.worker._set_kill_timer", alarms.append)
    worker, told, here = Worker(0), threading.Event(), zmq.Context.instance().socket(zmq.PAIR)
    here.connect(f"tcp://127.0.0.1:{worker._socket.bind_to_random_port('tcp://127.0.0.1')}")
    here.rcvtimeo = int(1000 * LIMIT_S)
    heard: list[object] = []

    class LostRank(SlowRank):
        def begin(self, plan: StepPlan) -> AtTheDevice:
            raise RuntimeError("an illegal memory access was encountered")

    @contextmanager
    def start(**_options: object) -> Iterator[SlowRank]:
        try:
            yield LostRank()
        finally:
            assert told.wait(LIMIT_S), "it is left while nobody knows"
            assert alarms[-1] == DEADLINES.step_s, "leaving may never end"
            raise ValueError("graphs cannot be destroyed")

    def listen() -> None:
        heard.append(decode(here.recv()))
        here.send(encode(StepPlan(3, ())))
        heard.append(decode(here.recv()))
        told.set()

    listener = threading.Thread(target=listen)
    listener.start()
    with pytest.raises(ValueError, match="graphs cannot be destroyed"):
        worker.serve(launcher=SimpleNamespace(start=start), **CALL)
    listener.join(LIMIT_S)
    _, failed = heard
    assert isinstance(failed, RankFailed)
    assert "illegal memory access" in failed.message
    assert failed.step == 3
    assert not here.poll(0), "it was told once"
    here.close(linger=0)


def test_a_rank_that_is_called_before_its_replica_is_connected_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.worker._set_kill_timer", lambda _seconds: None)
    worker, here = Worker(0), zmq.Context.instance().socket(zmq.PAIR)
    here.rcvtimeo = int(1000 * LIMIT_S)
    address = f"tcp://127.0.0.1:{worker._socket.bind_to_random_port('tcp://127.0.0.1')}"

    @contextmanager
    def start(**_options: object) -> Iterator[SlowRank]:
        yield SlowRank()

    def come_late() -> None:
        here.connect(address)
        here.send(encode(Stop()))

    late = threading.Timer(0.2, come_late)
    late.start()
    try:
        worker.serve(launcher=SimpleNamespace(start=start), **CALL)
        assert isinstance(decode(here.recv()), RankReady)
    finally:
        late.join()
        here.close(linger=0)


def test_a_rank_whose_replica_never_connects_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    alarms: list[float] = []
    monkeypatch.setattr("cluster.worker._set_kill_timer", alarms.append)
    worker = Worker(0)
    worker._socket.bind("inproc://never")
    deadlines = Deadlines(start_s=0.01, first_step_s=LIMIT_S, step_s=LIMIT_S)
    with pytest.raises(ChannelError, match=r"did not connect within 0\.01 s"):
        worker.serve(launcher=SimpleNamespace(), rendezvous=None, ranks_on_host=1, deadlines=deadlines)  # type: ignore[arg-type]
    assert not any(alarms), "the kernel's alarm would have been sooner, without a word"
