"""Two faults of different kinds at once: what recovers from one may need what the other has hurt."""

import asyncio
import contextlib
import random
import resource

import psutil

from tests.faults.catalogue import FAULTS, Fault, Harm, Inject, kill, one_of
from tests.faults.server import Victims

TOGETHER = (
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
"""Not a step that raises and a replica that is killed: a request that was there both times, and then at three attempts without a token, is
failed as poisoned, as it should be."""
STARVED_S = 12.0
"""Longer than a replica takes to be replaced."""


def both(first: Fault, second: Fault) -> Fault:
    async def inject(victims: Victims, chance: random.Random) -> Harm:
        harms = [await fault.inject(victims, chance) for fault in (first, second)]
        undos = [harm.undo for harm in harms if harm.undo is not None]

        async def undo() -> None:
            await asyncio.gather(*(each() for each in undos))

        return Harm(
            gone=harms[0].gone | harms[1].gone,
            undo=undo if undos else None,
            points=harms[0].points + harms[1].points,
            lost=next((harm.lost for harm in harms if harm.lost is not None), None),
        )

    return Fault(
        f"{first.name}+{second.name}",
        f"{first.says}, and {second.says}",
        inject,
        tier=max(first.tier, second.tier),
        may_fail=first.may_fail | second.may_fail,
    )


async def _few_descriptors(victims: Victims, chance: random.Random) -> Harm:
    """A front has so few left when it is to meet a new replica that some of what it opens finds none, and some does."""
    front, replica = one_of(victims.fronts(), chance), one_of(victims.replicas(), chance)
    soft, hard = resource.prlimit(front.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(front.pid, resource.RLIMIT_NOFILE, (front.num_fds() + chance.randint(1, 9), hard))

    async def give_back() -> None:
        await asyncio.sleep(STARVED_S)
        assert front.is_running(), "the front is gone"
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            resource.prlimit(front.pid, resource.RLIMIT_NOFILE, (soft, hard))

    return Harm(gone=kill([replica]), undo=give_back)


def _directory_and(inject: Inject) -> Inject:
    async def both_killed(victims: Victims, chance: random.Random) -> Harm:
        kill(victims.named("ray::Register"))
        return await inject(victims, chance)

    return both_killed


def _pairs() -> dict[str, Fault]:
    pairs = [both(FAULTS[first], FAULTS[second]) for first, second in TOGETHER]
    pairs.append(
        Fault("few_descriptors+replica_killed", "a front has hardly a file descriptor left, and a replica is killed", _few_descriptors)
    )
    killed = FAULTS["replica_killed"]
    pairs.append(Fault("directory_killed+replica_killed", f"the directory is killed, and {killed.says}", _directory_and(killed.inject)))
    return {fault.name: fault for fault in pairs}


PAIRS = _pairs()
