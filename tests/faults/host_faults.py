"""Faults of hosts: a host is killed, frozen or cut off, or the head is lost and restarted with its state in Redis."""

import asyncio
import contextlib
import random
from typing import cast

import psutil

from tests.faults.catalogue import Catalogue, Fault, Inject, Injected
from tests.faults.host_server import Host, HostVictims
from tests.faults.server import BUSY_S, Victims
from tests.processes import kill
from tests.system.network import Cut
from tests.system.ray_host import has_ended
from tests.system.server import eventually

SHORT_S, LONG_S = 6.0, 25.0
"""Shorter and longer than Ray takes to give up a host (`tests.faults.host_server.FAST_HEALTH_CHECKS`)."""

HEARS_S = 60.0


def _far(victims: Victims) -> Host:
    return cast(HostVictims, victims).hosts.far


async def _settled(host: Host, away_s: float) -> None:
    """Wait until a host that Ray has given up has ended its Ray, and restart it; until then it only looks healthy."""
    if away_s < LONG_S:
        return
    with contextlib.suppress(AssertionError):  # it was not given up
        await asyncio.to_thread(eventually, lambda: has_ended(host.ray.process), HEARS_S)
    await asyncio.to_thread(host.supervise)


async def _host_killed(victims: Victims, chance: random.Random) -> Injected:
    host = _far(victims)

    async def come_back() -> None:
        await asyncio.sleep(chance.choice((0.0, SHORT_S, LONG_S)))
        await asyncio.to_thread(host.start_anew)

    return Injected(gone=host.kill(), undo=come_back)


async def _host_frozen(victims: Victims, chance: random.Random) -> Injected:
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

    return Injected(undo=thaw)


def _host_cut_off(ways: Cut) -> Inject:
    async def inject(victims: Victims, chance: random.Random) -> Injected:
        network, place = cast(HostVictims, victims).hosts.network, _far(victims).ray.place
        _far(victims).family()
        network.cut(place, ways)

        async def mend() -> None:
            await asyncio.sleep(away_s := chance.choice((SHORT_S, LONG_S)))
            network.mend(place, ways)
            await _settled(_far(victims), away_s)

        return Injected(undo=mend)

    return inject


async def _head_killed(victims: Victims, chance: random.Random) -> Injected:
    """After the head is back, a rank is killed: that a new one is started shows that Ray works."""
    head = cast(HostVictims, victims).hosts.head
    injected = Injected(gone=head.kill())

    async def come_back() -> None:
        await asyncio.sleep(chance.choice((0.0, SHORT_S, LONG_S)))
        await asyncio.to_thread(head.start_anew)
        await victims.wait_until_recovered(injected.gone, BUSY_S)
        injected.gone |= kill([chance.choice(victims.ranks())])

    injected.undo = come_back
    return injected


def host_faults() -> dict[str, Fault]:
    it = Catalogue()
    times = f"{SHORT_S:g} or {LONG_S:g} s"
    it.add("host_killed", f"a host is killed, and restarted at once or after {times}", _host_killed, keeps_coming=True)
    it.add("host_frozen", f"all of a host is frozen for {times}", _host_frozen, keeps_coming=True)
    for ways, name in ((Cut.BOTH, "host_cut_off"), (Cut.TOWARDS, "host_deaf"), (Cut.FROM, "host_mute")):
        description = f"a host is cut off for {times}: packets {ways.value} are lost"
        it.add(name, description, _host_cut_off(ways), keeps_coming=True)
    description = f"the head is killed, and restarted at once or after {times}; then a rank is killed"
    it.add("head_killed", description, _head_killed, keeps_coming=True)
    return it.faults


HOST_FAULTS = host_faults()
