"""The faults: which process is hit, how, what clients may see of it, and what ends the fault."""

import asyncio
import contextlib
import os
import random
import resource
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import psutil

from engine.failpoints import Failure, arm, disarm, has_fired
from tests.faults import side_requests
from tests.faults.server import Victims
from tests.faults.side_requests import SideRequests
from tests.processes import kill

MESSAGES = ("intake.send", "link.receive", "intake.read", "link.send")
FRONT_LOST = frozenset({"503 unavailable"})
"""Allowed before an answer has begun."""
THAWED_AFTER_S = 6.0
"""Twice the time after which a frozen replica is given up."""
TEMPORARY_S = 4.0
"""Duration of temporary faults: longer than the streams take, and than a replica may be silent."""


@dataclass
class Injected:
    """What a fault has done."""

    gone: frozenset[int] = frozenset()
    """Pids of processes that must not be part of the recovered server."""
    undo: Callable[[], Awaitable[None]] | None = None
    """Ends the fault; runs while the streams do. The server has not recovered before it is done."""
    points: tuple[str, ...] = ()
    """Failpoints that were armed; they are disarmed at the end of the run."""
    lost: list[str] | None = None
    """If the fault is the loss of messages: the failpoint of each message that was lost."""


Inject = Callable[[Victims, random.Random], Awaitable[Injected]]


@dataclass(frozen=True)
class Fault:
    name: str
    description: str
    inject: Inject
    tier: int = 1
    """1: no client may see it. 2: it hits the process that holds the clients' sockets; streams may break off, but not look complete."""
    may_fail: frozenset[str] = frozenset()
    """Typed errors with which a stream may end."""
    side_requests: SideRequests | None = None
    """Additional requests that run beside the streams."""
    clients_leave: bool = False
    """Half of the clients disconnect in the middle of their streams."""
    keeps_coming: bool = False
    """New streams are started until the fault has ended."""


def one_of(processes: list[psutil.Process], chance: random.Random) -> psutil.Process:
    if not processes:
        raise AssertionError("there is nobody to hurt")
    return chance.choice(processes)


def _killing(find: Callable[[Victims], list[psutil.Process]]) -> Inject:
    async def inject(victims: Victims, chance: random.Random) -> Injected:
        return Injected(gone=kill([one_of(find(victims), chance)]))

    return inject


async def _rank_frozen(victims: Victims, chance: random.Random) -> Injected:
    victim = one_of(victims.ranks(), chance)
    victim.suspend()
    return Injected(gone=frozenset({victim.pid}))


async def _replica_frozen(victims: Victims, chance: random.Random) -> Injected:
    victim = one_of(victims.replicas(), chance)
    victim.suspend()

    async def thaw() -> None:
        await asyncio.sleep(THAWED_AFTER_S)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.resume()

    return Injected(undo=thaw)


async def _rank_slow(victims: Victims, chance: random.Random) -> Injected:
    """A rank gets a tenth of its CPU time for `TEMPORARY_S`."""
    victim = one_of(victims.ranks(), chance)

    async def slow_down() -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + TEMPORARY_S
        with contextlib.suppress(psutil.NoSuchProcess):
            while loop.time() < until:
                victim.suspend()
                await asyncio.sleep(0.09)
                victim.resume()
                await asyncio.sleep(0.01)

    return Injected(undo=slow_down)


async def _two_faults(victims: Victims, chance: random.Random) -> Injected:
    """A rank is killed, and within two seconds another rank of either replica, or a replica."""
    first = kill([one_of(victims.ranks(), chance)])
    await asyncio.sleep(chance.uniform(0.05, 2.0))
    others = [process for process in victims.ranks() + victims.replicas() if process.pid not in first]
    return Injected(gone=first | (kill([chance.choice(others)]) if others else frozenset()))


async def _all_ranks(victims: Victims, chance: random.Random) -> Injected:
    return Injected(gone=kill(victims.ranks()))


async def _replica_and_front(victims: Victims, chance: random.Random) -> Injected:
    return Injected(gone=kill([one_of(victims.replicas(), chance), one_of(victims.fronts(), chance)]))


async def _disk_full(victims: Victims, chance: random.Random) -> Injected:
    """The disk with Ray's logs and sockets is full for `TEMPORARY_S`."""
    if victims.disk is None:
        raise AssertionError("this user cannot mount a disk that may be filled")
    filler = victims.disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    assert os.statvfs(victims.disk).f_bavail < 512

    async def free() -> None:
        await asyncio.sleep(TEMPORARY_S)
        filler.unlink()

    return Injected(undo=free)


async def _no_descriptors(victims: Victims, chance: random.Random) -> Injected:
    """A front or the proxy has no free file descriptor for `TEMPORARY_S`. The proxy's event loop (libuv) then accepts connections only to
    close them, so clients that connect at that time are cut off before an answer begins; running streams go on."""
    victim = one_of(victims.fronts() + victims.proxies(), chance)
    soft, hard = resource.prlimit(victim.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (victim.num_fds(), hard))

    async def give_back() -> None:
        await asyncio.sleep(TEMPORARY_S)
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (soft, hard))

    return Injected(undo=give_back)


def _frozen_awhile(find: Callable[[Victims], list[psutil.Process]]) -> Inject:
    async def inject(victims: Victims, chance: random.Random) -> Injected:
        victim = one_of(find(victims), chance)
        victim.send_signal(signal.SIGSTOP)

        async def thaw() -> None:
            await asyncio.sleep(TEMPORARY_S)
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGCONT)

        return Injected(undo=thaw)

    return inject


def _failing(point: str, *failures: Failure) -> Inject:
    async def inject(victims: Victims, chance: random.Random) -> Injected:
        arm(victims.failpoints, point, chance.choice(failures))
        return Injected(points=(point,))

    return inject


def _lost_messages(count: int, *points: str) -> Inject:
    """``count`` messages between fronts and replicas are lost within two seconds, one after the other."""

    async def inject(victims: Victims, chance: random.Random) -> Injected:
        point, lost = chance.choice(points), list[str]()

        async def lose() -> None:
            for _ in range(count):
                arm(victims.failpoints, point, Failure(action="drop", after=chance.randint(1, 3)))
                await asyncio.sleep(2.0 / count)
                if not disarm(victims.failpoints, point):
                    lost.append(point)

        return Injected(undo=lose, points=(point,), lost=lost)

    return inject


def _cut(*points: str) -> Inject:
    """All messages of a replica in one direction are lost for 6 s; none in the other direction."""

    async def inject(victims: Victims, chance: random.Random) -> Injected:
        point, victim, lost = chance.choice(points), one_of(victims.replicas(), chance), list[str]()
        arm(victims.failpoints, point, Failure(action="drop", pid=victim.pid))

        async def mend() -> None:
            await asyncio.sleep(6.0)
            disarm(victims.failpoints, point)
            if has_fired(victims.failpoints, point):
                lost.append(point)

        return Injected(undo=mend, points=(point,), lost=lost)

    return inject


async def _nothing(victims: Victims, chance: random.Random) -> Injected:
    return Injected()


@dataclass
class Catalogue:
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(self, name: str, description: str, inject: Inject, **more: object) -> None:
        self.faults[name] = Fault(name, description, inject, **more)  # type: ignore[arg-type]


def catalogue() -> dict[str, Fault]:
    it = Catalogue()
    it.add("nothing", "no fault (baseline)", _nothing)
    it.add("rank_killed", "a rank is killed", _killing(Victims.ranks))
    it.add("rank_frozen", "a rank is frozen (SIGSTOP) for good", _rank_frozen)
    it.add("rank_slow", f"a rank is slowed down to a tenth for {TEMPORARY_S:g} s", _rank_slow)
    it.add("all_ranks_killed", "all ranks of both replicas are killed at once", _all_ranks)
    it.add("replica_killed", "a replica's own process is killed", _killing(Victims.replicas))
    it.add("replica_frozen", f"a replica's own process is frozen for {THAWED_AFTER_S:g} s", _replica_frozen)
    it.add("two_faults", "a rank is killed, and within 2 s another rank or a replica", _two_faults)
    it.add("controller_killed", "Ray Serve's controller is killed", _killing(Victims.controllers))
    it.add("front_frozen", f"a front is frozen for {TEMPORARY_S:g} s", _frozen_awhile(Victims.fronts))
    it.add("proxy_frozen", f"Ray Serve's proxy is frozen for {TEMPORARY_S:g} s", _frozen_awhile(Victims.proxies))
    it.add("front_killed", "a front is killed", _killing(Victims.fronts), tier=2, may_fail=FRONT_LOST)
    it.add("proxy_killed", "Ray Serve's proxy is killed", _killing(Victims.proxies), tier=2)
    it.add("replica_and_front", "a replica and a front are killed at once", _replica_and_front, tier=2, may_fail=FRONT_LOST)
    it.add("no_memory", "a rank is out of memory (MemoryError in a step)", _failing("rank.step", Failure(action="memory")))
    it.add("step_raises", "a step raises in a rank", _failing("rank.step", Failure(action="error"), Failure(action="error", after=9)))
    it.add("answer_lost", "a rank's answer is lost", _failing("rank.answer", Failure(action="drop")))
    it.add("engine_raises", "the engine's thread raises", _failing("engine.turn", Failure(action="error")))
    it.add("messages_lost", "two messages from replicas to fronts are lost within 2 s", _lost_messages(2, "intake.send", "link.receive"))
    it.add("requests_lost", "two messages from fronts to replicas are lost within 2 s", _lost_messages(2, "intake.read", "link.send"))
    it.add(
        "many_messages_lost",
        "eight messages between fronts and replicas, in one direction, are lost within 2 s",
        _lost_messages(8, *MESSAGES),
    )
    it.add("cut_off", "all messages between a replica and the fronts are lost in one direction for 6 s", _cut("intake.send", "intake.read"))
    it.add("nan", "all logits of a step are NaN", _failing("rank.logits", Failure(action="drop"), Failure(action="drop", after=9)))
    it.add("disk_full", f"the disk with Ray's logs and sockets is full for {TEMPORARY_S:g} s", _disk_full)
    it.add("no_descriptors", f"a front or the proxy has no free file descriptors for {TEMPORARY_S:g} s", _no_descriptors, tier=2)
    it.add("poison", "an additional request kills every rank that computes it", _nothing, side_requests=side_requests.poison)
    it.add("clients_leave", "half of the clients disconnect midway", _nothing, clients_leave=True)
    it.add(
        "same_key",
        "ten additional requests have the same idempotency key, and a rank is killed",
        _killing(Victims.ranks),
        side_requests=side_requests.same_key,
    )
    it.add("deaf_client", "an additional client does not read its stream", _nothing, side_requests=side_requests.deaf)
    it.add(
        "kv_exhausted",
        "additional long answers need more than all KV blocks of both replicas",
        _nothing,
        side_requests=side_requests.long_answers,
    )
    it.add("long_prompts", "additional prompts fill the model's context", _nothing, side_requests=side_requests.long_prompts)
    it.add("many_connections", "1,000 additional connections at once", _nothing, side_requests=side_requests.crowd)
    return it.faults


FAULTS = catalogue()
