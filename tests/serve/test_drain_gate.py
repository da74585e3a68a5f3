"""Draining with notice: requests are accepted until whoever sends them knows better. `grpc/test_stopping.py` ends requests."""

import asyncio
from typing import Any

import pytest

from serve.drain_gate import DrainGate
from serve.errors import Draining

LONG_S = 1e6


class Inner:
    """A service that answers everything."""

    async def embed(self, request: Any) -> str:
        return "answered"

    def ready(self) -> bool:
        return True


def gate_of() -> DrainGate:
    return DrainGate(Inner())  # type: ignore[arg-type]


async def accepts(gate: DrainGate) -> bool:
    try:
        await gate.embed("request")  # type: ignore[arg-type]
    except Draining:
        return False
    return True


async def test_without_notice_requests_are_refused_at_once() -> None:
    gate = gate_of()
    assert gate.drain() == 0.0
    assert gate.draining
    assert not await accepts(gate)


async def test_with_notice_a_gate_says_that_it_drains_before_it_refuses() -> None:
    gate = gate_of()
    left_s = gate.drain(notice_s=0.05)
    assert 0.0 < left_s <= 0.05
    assert (gate.draining, gate.ready()) == (True, True)
    assert await accepts(gate)
    await asyncio.sleep(0.1)
    assert not gate.ready()
    assert gate.drain(notice_s=LONG_S) == 0.0, "who has had notice gets no other"
    assert not await accepts(gate)


async def test_a_second_notice_does_not_prolong_the_first() -> None:
    gate = gate_of()
    first_s = gate.drain(notice_s=LONG_S)
    assert gate.drain(notice_s=2 * LONG_S) <= first_s


@pytest.mark.parametrize("hurry", ["drain", "end"])
async def test_notice_is_cut_short_when_the_server_stops(hurry: str) -> None:
    gate = gate_of()
    gate.drain(notice_s=LONG_S)
    if hurry == "drain":
        gate.drain()
    else:
        await gate.end_requests(0.0)
    assert not await accepts(gate)


async def test_a_gate_that_is_opened_again_forgets_the_notice() -> None:
    gate = gate_of()
    gate.drain(notice_s=0.02)
    gate.reopen()
    await asyncio.sleep(0.1)
    assert (gate.draining, gate.ready(), await accepts(gate)) == (False, True, True)
    gate.drain()
    gate.reopen()
    assert await accepts(gate)
