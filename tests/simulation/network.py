"""Simulated connections between a front and the replicas, which delay, repeat, reorder and drop messages."""

import asyncio
import random
from collections.abc import Awaitable
from dataclasses import dataclass, field

from cluster.front_protocol import FrontGone
from cluster.transport import TransportBroken
from tests.simulation.replica import SimReplica


@dataclass
class Weather:
    """Probabilities per message. Real sockets only delay messages; the protocol must survive the rest as well."""

    delay_s: float = 0.01
    drop: float = 0.0
    repeat: float = 0.0
    overtake: float = 0.0


@dataclass
class Network:
    chance: random.Random
    weather: Weather
    replicas: dict[str, SimReplica] = field(default_factory=dict)
    transports: dict[bytes, "SimTransport"] = field(default_factory=dict)
    cut_until: dict[tuple[str, str], float] = field(default_factory=dict)
    """(replica, direction "to" or "from") -> until when its messages are lost."""

    def connect(self, replica_id: str) -> "SimTransport":
        transport = SimTransport(self, replica_id, b"front-%d" % len(self.transports))
        self.transports[transport.name] = transport
        return transport

    def post(self, front: bytes, raw: bytes) -> None:
        """Send a message from a replica to the front."""
        transport = self.transports[front]
        if transport.is_closed:
            raise FrontGone
        self.carry(raw, transport.replica_id, "from", transport)

    def carry(self, raw: bytes, replica_id: str, direction: str, transport: "SimTransport") -> None:
        loop, chance, weather = asyncio.get_running_loop(), self.chance, self.weather
        if chance.random() < weather.drop or loop.time() < self.cut_until.get((replica_id, direction), 0.0):
            return
        for _ in range(2 if chance.random() < weather.repeat else 1):
            due = loop.time() + chance.uniform(0.0, 2 * weather.delay_s)
            if chance.random() >= weather.overtake:
                due = transport.last_due[direction] = max(due, transport.last_due[direction] + 1e-9)  # timers of equal times have no order
            loop.call_at(due, self._arrive, raw, replica_id, direction, transport)

    def _arrive(self, raw: bytes, replica_id: str, direction: str, transport: "SimTransport") -> None:
        if direction == "from":
            transport.arrived.put_nowait(raw)
        elif (replica := self.replicas.get(replica_id)) is not None:
            replica.receive(transport.name, raw)

    def kill(self, replica_id: str) -> None:
        """End the replica's process: its sockets are closed, which the front notices soon after."""
        self.replicas.pop(replica_id).kill()
        for transport in self.transports.values():
            if transport.replica_id == replica_id:
                asyncio.get_running_loop().call_later(0.02, transport.gone.set)


class SimTransport:
    def __init__(self, network: Network, replica_id: str, name: bytes) -> None:
        self._network, self.replica_id, self.name = network, replica_id, name
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self.gone = asyncio.Event()
        self.is_closed = False
        self.last_due = {"to": 0.0, "from": 0.0}

    def send(self, raw: bytes) -> None:
        if self.gone.is_set():
            raise TransportBroken("gone")
        if not self.is_closed:
            self._network.carry(raw, self.replica_id, "to", self)

    def receive(self) -> Awaitable[bytes]:
        return self.arrived.get()

    def closed(self) -> Awaitable[object]:
        return self.gone.wait()

    def close(self) -> None:
        self.is_closed = True
