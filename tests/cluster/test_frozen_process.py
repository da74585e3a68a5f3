"""Processes that stand still."""

import os
import signal
import subprocess
import sys
import time

from cluster.frozen_process import FrozenProcessDetector, context_switches_if_stopped, is_stopped


class World:
    now = 0.0
    stopped: frozenset[int] = frozenset()
    at = 0

    def watch(self) -> FrozenProcessDetector:
        return FrozenProcessDetector(
            {0: 10, 1: 11}, 4.0, clock=lambda: self.now, probe=lambda pid: self.at if pid in self.stopped else None
        )


def test_a_process_that_stands_still_without_a_break_is_frozen_and_one_that_goes_on_is_not() -> None:
    world = World()
    watch = world.watch()
    seen: list[int | None] = []
    for now, stopped in ((1, {11}), (2, {11}), (3, set()), (4, {11}), (5, {11}), (6, {11}), (7, {11}), (8, {11})):
        world.now, world.stopped = now, frozenset(stopped)
        seen.append(watch.frozen_rank())
    assert seen == [None] * 7 + [1]


def test_a_process_that_is_stopped_again_and_again_is_slow_and_not_frozen() -> None:
    world = World()
    watch = world.watch()
    world.stopped = frozenset({11})
    for now in range(1, 20):
        world.now, world.at = float(now), now  # it ran in between
        assert watch.frozen_rank() is None
    world.now = 24.0
    assert watch.frozen_rank() is None
    world.now = 28.0
    assert watch.frozen_rank() == 1


def test_what_was_seen_before_a_long_time_without_looking_does_not_count() -> None:
    world = World()
    watch = world.watch()
    world.now, world.stopped = 1.0, frozenset({10})
    assert watch.frozen_rank() is None
    world.now = 100.0
    assert watch.frozen_rank() is None


def test_a_stopped_process_of_this_machine_is_seen_as_such() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        try:
            assert not is_stopped(process.pid)
            os.kill(process.pid, signal.SIGSTOP)
            deadline = time.monotonic() + 60
            while not is_stopped(process.pid):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            stopped = context_switches_if_stopped(process.pid)
            assert context_switches_if_stopped(process.pid) == stopped
            os.kill(process.pid, signal.SIGCONT)
            os.kill(process.pid, signal.SIGSTOP)
            while context_switches_if_stopped(process.pid) in (None, stopped):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
    assert not is_stopped(process.pid)
