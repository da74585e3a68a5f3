"""HTTP and gRPC over a real engine in this process: a tiny random Qwen2 with a real tokenizer, on real sockets of the loopback."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from engine.config import EngineConfig
from engine.run.local_executor import LocalExecutor
from engine.run.settings import RunnerConfig
from model.pooling import PoolingKind
from serve.drain_gate import DrainGate
from serve.grpc.server import start_server
from serve.http.app import create_app
from serve.idempotency import IdempotentService
from serve.limits import Limits
from serve.model_facts import ModelFacts
from serve.request_observer import Observer
from serve.service import Service
from serve.text.tokenizer import Tokenizer
from tests.fakes.engine_source import EngineSource
from tests.serve.http.loopback import served
from tests.serve.vocabularies import MODEL_CONFIG, write_smol

MODEL = "tiny"
NUM_BLOCKS = 256


@dataclass(frozen=True, kw_only=True)
class Fronts:
    service: Service
    gate: DrainGate
    refused: list[str]
    """The model of each request that the gate has refused."""
    source: EngineSource
    http: str
    """Base URL."""
    grpc: str
    """Endpoint for the client library."""


def write_tiny(folder: Path) -> Path:
    """A whole checkpoint: the small vocabulary, and random weights that tell its tokens apart."""
    write_smol(folder)
    settings = (folder / "config.json").read_text()
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**MODEL_CONFIG | {"vocab_size": 640, "initializer_range": 0.5})).save_pretrained(folder)
    (folder / "config.json").write_text(settings)
    return folder


@asynccontextmanager
async def fronts(
    folder: Path,
    *,
    limits: Limits | None = None,
    observers: Sequence[Observer] = (),
    pooling: PoolingKind | Literal["auto"] = "auto",
) -> AsyncIterator[Fronts]:
    tokenizer, config = Tokenizer.from_folder(folder), EngineConfig()
    facts = ModelFacts.from_checkpoint(folder, name=MODEL, tokenizer=tokenizer, pooling=pooling)
    runner = RunnerConfig(
        device="cpu", dtype="float32", num_threads=1, num_real_tokens=facts.num_real_tokens, kv_cache_bytes=NUM_BLOCKS * 16 * 2 * 4 * 4
    )
    source = EngineSource(LocalExecutor.open(folder, runner_config=runner, engine_config=config), config)
    try:
        service = Service(
            model=facts,
            tokenizer=tokenizer,
            source=source,
            limits=limits,
            observers=observers,
            requests_are_ended=lambda: gate.has_ended_requests,
        )
        refused: list[str] = []
        gate = DrainGate(IdempotentService(service), on_refusal=lambda request, error: refused.append(request.model))
        server, port = await start_server(gate, "127.0.0.1:0", fleets=[source], limits=limits)
        try:
            async with served(create_app(lambda: gate, limits)) as url:
                yield Fronts(service=service, gate=gate, refused=refused, source=source, http=url, grpc=f"grpc://127.0.0.1:{port}")
        finally:
            await server.stop(grace=None)
    finally:
        source.close()
