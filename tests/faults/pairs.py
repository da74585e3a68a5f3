"""Two faults of different kinds at once: recovery from one may need what the other has damaged."""

import asyncio
import contextlib
import random
import resource

import psutil

from tests.faults.catalogue import FAULTS, Fault, Inject, Injected, one_of
from tests.faults.server import Victims
from tests.processes import kill

PAIRED = (
    ("controller_killed", "replica_killed"),
    ("controller_killed", "all_ranks_killed"),
    ("controller_killed", "front_killed"),
    ("disk_full", "rank_killed"),
    ("disk_full", "replica_killed"),
    ("proxy_frozen", "controller_killed"),
    ("proxy_frozen", "replica_killed"),
    ("proxy_killed", "replica_killed"),
    ("proxy_killed", "rank_frozen"),
    ("front_frozen", "rank_killed"),
    ("front_frozen", "replica_frozen"),
    ("replica_frozen", "front_killed"),
    ("no_descriptors", "rank_killed"),
    ("many_messages_lost", "replica_killed"),
    ("cut_off", "rank_killed"),
    ("nan", "rank_killed"),
)
"""A step that raises together with a killed replica is left out: a request that is present at both, and then makes three attempts without a
token, rightly fails as poisoned."""
STARVED_S = 12.0
"""Longer than the replacement of a replica takes."""


def both(first: Fault, second: Fault) -> Fault:
    async def inject(victims: Victims, chance: random.Random) -> Injected:
        injected_faults = [await fault.inject(victims, chance) for fault in (first, second)]
        undos = [injected.undo for injected in injected_faults if injected.undo is not None]

        async def undo() -> None:
            await asyncio.gather(*(each() for each in undos))

        return Injected(
            gone=injected_faults[0].gone | injected_faults[1].gone,
            undo=undo if undos else None,
            points=injected_faults[0].points + injected_faults[1].points,
            lost=next((injected.lost for injected in injected_faults if injected.lost is not None), None),
        )

    return Fault(
        f"{first.name}+{second.name}",
        f"{first.description}, and {second.description}",
        inject,
        tier=max(first.tier, second.tier),
        may_fail=first.may_fail | second.may_fail,
    )


async def _few_descriptors(victims: Victims, chance: random.Random) -> Injected:
    """A front has so few free file descriptors that connecting to a new replica partly fails."""
    front, replica = one_of(victims.fronts(), chance), one_of(victims.replicas(), chance)
    soft, hard = resource.prlimit(front.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(front.pid, resource.RLIMIT_NOFILE, (front.num_fds() + chance.randint(1, 9), hard))

    async def give_back() -> None:
        await asyncio.sleep(STARVED_S)
        assert front.is_running(), "the front is gone"
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            resource.prlimit(front.pid, resource.RLIMIT_NOFILE, (soft, hard))

    return Injected(gone=kill([replica]), undo=give_back)


def _directory_and(inject: Inject) -> Inject:
    async def both_killed(victims: Victims, chance: random.Random) -> Injected:
        kill(victims.named("ray::Register"))
        return await inject(victims, chance)

    return both_killed


def _pairs() -> dict[str, Fault]:
    pairs = [both(FAULTS[first], FAULTS[second]) for first, second in PAIRED]
    pairs.append(
        Fault("few_descriptors+replica_killed", "a front has hardly a file descriptor left, and a replica is killed", _few_descriptors)
    )
    killed = FAULTS["replica_killed"]
    pairs.append(
        Fault("directory_killed+replica_killed", f"the directory is killed, and {killed.description}", _directory_and(killed.inject))
    )
    return {fault.name: fault for fault in pairs}


PAIRS = _pairs()
