"""A real engine in this process as a front's source of tokens: what router and replica are in a server, without Ray."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence

from cluster.channel import Address
from cluster.directory import ReplicaRecord
from cluster.errors import RequestAborted
from cluster.health import State
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Executor
from engine.plan import TokenEvent
from engine.request import Request


class EngineSource:
    """To be made, used and closed in one running event loop."""

    def __init__(self, executor: Executor, config: EngineConfig) -> None:
        self.engine, self._executor = Engine(executor, config), executor
        self._loop = asyncio.get_running_loop()
        self.requests: list[Request] = []
        """All that came."""
        self._streams: dict[tuple[str, int], asyncio.Queue[TokenEvent | Exception]] = {}
        self._thread = threading.Thread(target=self.engine.run_forever, args=(self._deliver,), name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.engine.stop()
        self._thread.join(10)
        self._executor.close()

    def ready(self) -> bool:
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether no request holds anything any more."""
        stats = self.engine.stats
        return not (stats.num_running or stats.num_waiting or stats.blocks_used or self._streams)

    @property
    def replicas(self) -> Sequence[ReplicaRecord]:
        address = Address(node="here", ipc="nowhere", tcp=None)
        return (
            ReplicaRecord(
                id="r", model="tiny", state=State.READY, address=address, capacity=self._executor.capacity, stats=self.engine.stats
            ),
        )

    def abort(self, request_id: str) -> int:
        streams = [stream for key, stream in self._streams.items() if key[0] == request_id]
        for stream in streams:
            stream.put_nowait(RequestAborted())
        return len(streams)

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        stream = self._streams[request.key] = asyncio.Queue()
        ended = False
        self.engine.submit(request)
        try:
            while not ended:
                event = await stream.get()
                if isinstance(event, Exception):
                    raise event
                ended = event.finish_reason is not None
                yield event
        finally:
            del self._streams[request.key]
            if not ended:
                self.engine.cancel(*request.key)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        self._loop.call_soon_threadsafe(self._hand_out, events)

    def _hand_out(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            stream = self._streams.get((event.request_id, event.choice))
            if stream is not None:
                stream.put_nowait(event)
