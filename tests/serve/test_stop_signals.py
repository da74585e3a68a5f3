"""Signals that stop a server: what each of them does, and that the third ends a process that waits for something that never comes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve import existing_ray, stop_signals
from serve.deployment import FRONTS
from serve.stop_signals import INTERRUPTED, DistinctSignals, StopSignals

ROOT = Path(__file__).parents[2]


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every signal counts, however soon it comes after another."""
    monkeypatch.setattr(stop_signals, "SAME_S", 0.0)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stop(clock: Clock) -> Iterator[StopSignals]:
    made = StopSignals(end_process=lambda: None, clock=clock)
    made.starting = False
    with made.handled():
        yield made


def test_signals_in_quick_succession_are_one_and_do_not_begin_the_next_stage(stop: StopSignals, clock: Clock) -> None:
    """As where a terminal signals the process group, and a wrapper passes the signal on, or ends its children with another."""
    send()
    for number in (signal.SIGINT, signal.SIGTERM):
        clock.now_s += 0.1
        send(number)
    assert (stop.stopped.is_set(), stop.repeated.is_set()) == (True, False)
    clock.now_s += stop_signals.SAME_S
    send()
    send()
    assert stop.repeated.is_set()
    clock.now_s += stop_signals.SAME_S
    with pytest.raises(KeyboardInterrupt):
        send()


def test_a_signal_that_is_sent_twice_during_the_start_interrupts_once(stop: StopSignals) -> None:
    stop.starting = True
    with pytest.raises(KeyboardInterrupt):
        send()
    send()
    assert not stop.repeated.is_set()


def test_whoever_hits_the_keys_again_and_again_gets_on(clock: Clock) -> None:
    """A repetition does not prolong the time in which another one is not counted."""
    distinct = DistinctSignals(clock)
    counted = []
    for _ in range(8):
        counted.append(distinct.counts())
        clock.now_s += 0.2
    assert counted == [True, False, False, True, False, False, True, False]


def test_a_process_is_not_ended_for_one_signal_that_is_sent_three_times(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(stop_signals, "LAST_S", 0.0)
    threads, was_ended = set(threading.enumerate()), threading.Event()
    stop = StopSignals(end_process=was_ended.set, clock=clock)
    stop.starting = False
    with stop.handled():
        (watching,) = [thread for thread in set(threading.enumerate()) - threads if thread.name == "stop-signals"]
        for _ in range(3):
            send()
    watching.join(30)
    assert (watching.is_alive(), was_ended.is_set()) == (False, False)


@pytest.mark.usefixtures("each_counts")
def test_the_first_stops_the_second_hastens_and_the_third_interrupts_once(stop: StopSignals) -> None:
    send()
    assert (stop.stopped.is_set(), stop.repeated.is_set()) == (True, False)
    send(signal.SIGTERM)
    assert stop.repeated.is_set()
    with pytest.raises(KeyboardInterrupt):
        send()
    send()  # what cleans up is not interrupted


@pytest.mark.usefixtures("each_counts")
def test_during_the_start_the_first_interrupts(stop: StopSignals) -> None:
    stop.starting = True
    with pytest.raises(KeyboardInterrupt):
        send()
    send()
    with pytest.raises(KeyboardInterrupt):
        send()


@pytest.mark.usefixtures("each_counts")
@pytest.mark.parametrize("restores_in_time", [False, True])
def test_a_process_that_has_not_cleaned_up_is_ended(monkeypatch: pytest.MonkeyPatch, restores_in_time: bool) -> None:
    monkeypatch.setattr(stop_signals, "LAST_S", 60.0 if restores_in_time else 0.0)
    handler, threads, was_ended = signal.getsignal(signal.SIGINT), set(threading.enumerate()), threading.Event()
    stop = StopSignals(end_process=was_ended.set)
    stop.starting = False
    with stop.handled():
        (watching,) = [thread for thread in set(threading.enumerate()) - threads if thread.name == "stop-signals"]
        send()
        send()
        with pytest.raises(KeyboardInterrupt):
            send()
        if not restores_in_time:
            assert was_ended.wait(30)
    watching.join(30)
    assert (watching.is_alive(), was_ended.is_set()) == (False, not restores_in_time)
    assert signal.getsignal(signal.SIGINT) is handler, "as it was before: other tests in this process may have left theirs"


HANGING = """
import signal, threading
from serve import stop_signals
stop_signals.LAST_S, stop_signals.SAME_S = 0.1, 0.0
stop = stop_signals.StopSignals()
stop.starting = False
{already}
stop.install()
signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals.NUMBERS)  # the main thread runs no handler, as inside Ray
print("hangs", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(("already", "num_signals"), [("", 3), ("stop.stopped.set()", 2)])
def test_a_main_thread_that_runs_no_python_does_not_keep_the_process(already: str, num_signals: int) -> None:
    command = [sys.executable, "-c", HANGING.format(already=already)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        for _ in range(num_signals):
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            threading.Event().wait(0.1)  # a signal that is still pending swallows another of its number
        _, said = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "Ray has not ended" in said


class Controller:
    """Ray Serve's client, whose controller answers no order."""

    def __init__(self, on_order: Callable[[], None]) -> None:
        self._on_order = on_order

    def get_serve_details(self) -> dict[str, Any]:
        fronts = {"deployment_config": {"graceful_shutdown_timeout_s": 100.0}}
        return {"applications": {"app": {"deployments": {FRONTS: fronts}}}}

    def delete_apps(self, names: list[str], *, blocking: bool) -> None:
        self._on_order()
        threading.Event().wait()


@pytest.mark.usefixtures("each_counts")
@pytest.mark.parametrize("num_signals", [3, 2])
def test_a_controller_that_hangs_in_the_order_to_remove_does_not_keep_the_command(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_signals: int
) -> None:
    if num_signals == 2:
        stop.stopped.set()  # as `manta down` does

    def interrupt() -> None:
        threading.Thread(target=lambda: [(send(), threading.Event().wait(0.2)) for _ in range(num_signals)], daemon=True).start()

    monkeypatch.setattr(existing_ray, "_get_global_client", lambda **_: Controller(interrupt))
    monkeypatch.setattr(existing_ray.ray_serve, "status", lambda: SimpleNamespace(applications={"app": None}))
    monkeypatch.setattr(existing_ray, "requests_ending", lambda *_, **__: nullcontext())
    with pytest.raises(KeyboardInterrupt):
        existing_ray.remove("app", stop=stop)
    assert "has not confirmed the order to remove app" in caplog.text
