"""The real service over a real engine in this process, with random weights: what a client meets, without Ray."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import TokenEvent
from engine.request import Request
from engine.run.local_executor import LocalExecutor
from engine.run.settings import RunnerConfig
from serve.model_facts import ModelFacts
from serve.service import Service
from serve.structured.compiler import GrammarCompilerPool
from serve.text.tokenizer import Tokenizer
from serve.tools.protocol import ProtocolName


class EngineSource:
    """A `TokenSource`: one engine in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: dict[tuple[str, int], tuple[asyncio.AbstractEventLoop, asyncio.Queue[TokenEvent]]] = {}
        self.requests: list[Request] = []
        self._thread = threading.Thread(target=engine.run_forever, args=(self._deliver,), daemon=True)
        self._thread.start()

    def ready(self) -> bool:
        return True

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        arrived: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self.requests.append(request)
        self._waiting[request.key] = (asyncio.get_running_loop(), arrived)
        self._engine.submit(request)
        try:
            while True:
                event = await arrived.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            del self._waiting[request.key]
            self._engine.cancel(*request.key)

    def close(self) -> None:
        self._engine.stop()
        self._thread.join(60)

    def _deliver(self, events: list[TokenEvent]) -> None:
        for event in events:
            if waiting := self._waiting.get((event.request_id, event.choice)):
                loop, arrived = waiting
                loop.call_soon_threadsafe(arrived.put_nowait, event)


@contextmanager
def engine_service(folder: Path, *, tool_protocol: ProtocolName = "auto") -> Iterator[tuple[Service, EngineSource]]:
    """A service called "random" over the checkpoint in ``folder``."""
    tokenizer = Tokenizer.from_folder(folder)
    facts = ModelFacts.from_checkpoint(folder, name="random", tokenizer=tokenizer)
    facts = dataclasses.replace(facts, defaults=dataclasses.replace(facts.defaults, eos_token_ids=(tokenizer.eos_id,)))
    runner = RunnerConfig(device="cpu", dtype="float32", num_threads=1, kv_cache_bytes=64 << 20, num_real_tokens=tokenizer.num_real_tokens)
    config = EngineConfig(max_running=32)
    executor = LocalExecutor.open(folder, runner_config=runner, engine_config=config)
    source = EngineSource(Engine(executor, config))
    service = Service(model=facts, tokenizer=tokenizer, source=source, tool_protocol=tool_protocol)
    compiler = service._compiler
    try:
        yield service, source
    finally:
        source.close()
        executor.close()
        assert isinstance(compiler, GrammarCompilerPool)
        compiler.close()
