"""The faults of hosts: one is killed, frozen or cut off, or the head is lost and comes back with what Redis kept."""

import asyncio
import contextlib
import random
from typing import cast

import psutil

from tests.faults.catalogue import Catalogue, Fault, Harm, Inject, kill
from tests.faults.host_server import Host, HostVictims
from tests.faults.server import BUSY_S, Victims
from tests.system.network import Cut
from tests.system.ray_host import has_ended
from tests.system.server import eventually

SHORT_S, LONG_S = 6.0, 25.0
"""Shorter and longer than it takes Ray to give up a host (`tests.faults.host_server.FOUND_OUT`)."""

HEARS_S = 60.0


def _far(victims: Victims) -> Host:
    return cast(HostVictims, victims).hosts.far


async def _settled(host: Host, away_s: float) -> None:
    """A host that Ray gave up ends its Ray once it hears so; until then it looks whole, and is not."""
    if away_s < LONG_S:
        return
    with contextlib.suppress(AssertionError):  # it was not given up
        await asyncio.to_thread(eventually, lambda: has_ended(host.ray.process), HEARS_S)
    await asyncio.to_thread(host.supervise)


async def _host_killed(victims: Victims, chance: random.Random) -> Harm:
    host = _far(victims)

    async def come_back() -> None:
        await asyncio.sleep(chance.choice((0.0, SHORT_S, LONG_S)))
        await asyncio.to_thread(host.start_anew)

    return Harm(gone=host.kill(), undo=come_back)


async def _host_frozen(victims: Victims, chance: random.Random) -> Harm:
    frozen = _far(victims).family()
    for process in frozen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()

    async def thaw() -> None:
        await asyncio.sleep(away_s := chance.choice((SHORT_S, LONG_S)))
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        await _settled(_far(victims), away_s)

    return Harm(undo=thaw)


def _host_cut_off(ways: Cut) -> Inject:
    async def inject(victims: Victims, chance: random.Random) -> Harm:
        network, place = cast(HostVictims, victims).hosts.network, _far(victims).ray.place
        _far(victims).family()
        network.cut(place, ways)

        async def mend() -> None:
            await asyncio.sleep(away_s := chance.choice((SHORT_S, LONG_S)))
            network.mend(place, ways)
            await _settled(_far(victims), away_s)

        return Harm(undo=mend)

    return inject


async def _head_killed(victims: Victims, chance: random.Random) -> Harm:
    """Once it is back a rank is killed: that another one is started shows that Ray is whole."""
    head = cast(HostVictims, victims).hosts.head
    harm = Harm(gone=head.kill())

    async def come_back() -> None:
        await asyncio.sleep(chance.choice((0.0, SHORT_S, LONG_S)))
        await asyncio.to_thread(head.start_anew)
        await victims.until_whole(harm.gone, BUSY_S)
        harm.gone |= kill([chance.choice(victims.ranks())])

    harm.undo = come_back
    return harm


def host_faults() -> dict[str, Fault]:
    it = Catalogue()
    times = f"{SHORT_S:g} or {LONG_S:g} s"
    it.add("host_killed", f"a host is killed, and restarted at once or after {times}", _host_killed, keeps_coming=True)
    it.add("host_frozen", f"all of a host is frozen for {times}", _host_frozen, keeps_coming=True)
    for ways, name in ((Cut.BOTH, "host_cut_off"), (Cut.TOWARDS, "host_deaf"), (Cut.FROM, "host_mute")):
        says = f"a host is cut off for {times}: packets {ways.value} are lost"
        it.add(name, says, _host_cut_off(ways), keeps_coming=True)
    says = f"the head is killed, and restarted at once or after {times}; then a rank is killed"
    it.add("head_killed", says, _head_killed, keeps_coming=True)
    return it.faults


HOST_FAULTS = host_faults()
