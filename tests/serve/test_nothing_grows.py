"""Thousands of requests through front, wire and engine in one process: afterwards nothing more is held than before."""

import asyncio
import gc
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from benchmarks.simulated_server import MODEL, SimulatedExecutor, StepCost
from cluster.block_journal import BlockJournal
from cluster.channel import PrivateFolder
from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.health import State
from cluster.intake import Intake
from cluster.messages import Pong
from cluster.replica_link import ReplicaLink
from cluster.router import Router
from cluster.routing_policies import make_routing_policy
from engine.engine import Engine
from engine.fair_share import FairShare
from parallel.topology import Topology
from serve.drain_gate import DrainGate
from serve.http.app import create_app
from serve.idempotency import IdempotentService
from serve.metrics import Instruments
from serve.model_facts import ModelFacts
from serve.quotas import Quotas
from serve.request_metrics import RequestMetrics
from serve.service import Service
from serve.text.tokenizer import Tokenizer
from tests.serve.vocabularies import write_smol

ROOT = Path(__file__).parents[2]
COST = StepCost(base_s=0.0, token_s=0.0, num_blocks=300, max_running=16, max_waiting=64)
ROUND = 400
"""Requests between two looks."""
PER_REQUEST = 0.25
"""Objects that may be left of each, mostly those that Python itself keeps for later: whoever is forgotten leaves a whole one at least."""
MOST = PER_REQUEST * ROUND


class Only:
    def __init__(self, record: ReplicaRecord) -> None:
        self.known = (record,)

    async def refresh(self) -> tuple[ReplicaRecord, ...]:
        return self.known


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The whole way but Ray, uvicorn and a model."""
    journal = BlockJournal()
    engine = Engine(SimulatedExecutor(COST), COST.engine, policy=FairShare(), listener=journal)
    private = PrivateFolder()
    intake = Intake(
        folder=private,
        node="n",
        tcp_host=None,
        submit=engine.submit,
        cancel=engine.cancel,
        pong=lambda: Pong(ready=True, num_running=engine.stats.num_running, num_waiting=engine.stats.num_waiting),
        failed=print,
        front_silence_s=60.0,
        heartbeat_s=1.0,
        journal=journal,
    )
    thread = threading.Thread(target=engine.run_forever, args=(intake.deliver,), daemon=True)
    thread.start()
    intake.start()
    config = RouterConfig(replica_silence_s=60.0)
    router = Router(
        replicas=Only(ReplicaRecord(id="r", model=MODEL, state=State.READY, address=intake.address)),
        connect=lambda one: ReplicaLink(one, node="n", config=config),
        policy=make_routing_policy(config, COST.engine, Topology()),
        config=config,
    )
    await router.open()
    tokenizer = Tokenizer.from_folder(folder)
    service = Service(
        model=ModelFacts.from_checkpoint(folder, name=MODEL, tokenizer=tokenizer),
        tokenizer=tokenizer,
        source=router,
        observers=[RequestMetrics(Instruments("front"), [MODEL]), Quotas(num_fronts=lambda: 1)],
        refusal=router.recent_refusal,
    )
    gate = DrainGate(IdempotentService(service))
    try:
        app = httpx.ASGITransport(app=create_app(lambda: gate))
        async with httpx.AsyncClient(transport=app, base_url="http://front", timeout=120) as http:
            yield http
    finally:
        await router.close()
        engine.stop()
        await asyncio.to_thread(thread.join, 10)
        intake.close()
        private.close()


async def ask(http: httpx.AsyncClient, number: int) -> None:
    """Another prompt, user and session each time; one in eight is refused, one leaves in the middle."""
    body = {"model": MODEL, "prompt": f"number {number} of all that is asked " * 3, "max_tokens": 12, "user": f"user-{number}"}
    headers = {"x-session-id": f"session-{number}"}
    match number % 8:
        case 0:
            assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        case 1:
            assert (await http.post("/v1/completions", json=body | {"temperature": 3})).status_code == 400
        case 2:
            assert (await http.post("/v1/completions", json=body | {"n": 2, "logprobs": 2})).status_code == 200
        case 3:
            leaving = asyncio.create_task(http.post("/v1/completions", json=body | {"max_tokens": 500}))
            await asyncio.sleep(0.01)
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
        case _:
            answer = await http.post("/v1/completions", json=body | {"stream": True}, headers=headers)
            assert answer.content.endswith(b"data: [DONE]\n\n")


async def held_after(http: httpx.AsyncClient, numbers: range) -> int:
    """Blocks of memory that Python has given out, once all of these requests are over."""
    for first in numbers[::10]:
        await asyncio.gather(*(ask(http, number) for number in range(first, first + 10)))
    await asyncio.sleep(0.5)
    gc.collect()
    gc.collect()
    return sys.getallocatedblocks()


async def grown(folder: Path) -> list[int]:
    """Blocks more after each of three rounds; the last is one that leaves little, if any does."""
    found: list[int] = []
    async with served(folder) as http:
        await held_after(http, range(ROUND))  # fills caches that have an end
        before = await held_after(http, range(ROUND, 2 * ROUND))
        while len(found) < 3 and min(found, default=MOST) >= MOST:
            at = len(found) + 2
            after = await held_after(http, range(at * ROUND, (at + 1) * ROUND))
            found.append(after - before)
            before = after
    return found


def test_nothing_is_left_of_requests_that_are_over(tmp_path: Path) -> None:
    """In a process of its own: what other tests have turned on, pytest's records of the log among it, would be counted with it."""
    folder = write_smol(tmp_path)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"max_position_embeddings": 4096}))
    done = subprocess.run([sys.executable, "-m", __name__, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 1 <= len(found) <= 3
    assert min(found) < MOST, f"{found} more objects after {ROUND} requests each"


if __name__ == "__main__":
    print(json.dumps(asyncio.run(grown(Path(sys.argv[1])))))
