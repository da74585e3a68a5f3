"""A server with a simulated model: HTTP app, service, router, intake, scheduler and KV blocks are real; a step only takes a given time.

A replica and a front run as two processes, as on a cluster, connected by the server's own sockets. So overload and long runs can be tested
without a device, and without the model's load on the machine.
"""

import asyncio
import contextlib
import json
import multiprocessing
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from engine.config import EngineConfig
from engine.executor import Capacity
from engine.plan import SampledTokens, StepPlan, StepResult

MODEL = "paced"


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Duration of a step, and capacity of the replica."""

    base_s: float = 0.050
    token_s: float = 0.0002
    num_blocks: int = 2_000
    max_running: int = 16
    max_waiting: int = 16
    """About what can be started within two seconds; requests beyond that would wait too long."""

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(max_running=self.max_running, max_waiting=self.max_waiting, max_step_tokens=512)


class SimulatedExecutor:
    """Completes a step when its simulated time has passed."""

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self.capacity = Capacity(num_blocks=cost.num_blocks, block_tokens=16, max_context_tokens=4096)
        self._free_at = 0.0

    def submit(self, plan: StepPlan) -> "SimulatedStep":
        elapsed_s = self._cost.base_s + self._cost.token_s * plan.num_tokens
        self._free_at = max(self._free_at, time.monotonic()) + elapsed_s
        return SimulatedStep(plan, elapsed_s, self._free_at)

    def close(self) -> None:
        pass


class SimulatedStep:
    def __init__(self, plan: StepPlan, elapsed_s: float, done_at: float) -> None:
        self._plan, self._elapsed_s, self._done_at = plan, elapsed_s, done_at

    def result(self) -> StepResult:
        time.sleep(max(0.0, self._done_at - time.monotonic()))
        sampled = tuple(
            SampledTokens(work.sequence, (300 + (work.start + len(work.tokens)) % 200,)) for work in self._plan.works if work.samples
        )
        return StepResult(self._plan.step, sampled, elapsed_s=self._elapsed_s)


def _replica(tell: Any, cost: StepCost) -> None:
    """The replica process. Answers any message on the pipe with its engine's statistics; ends on "end"."""
    from cluster.channel import PrivateFolder
    from cluster.intake import Intake
    from cluster.messages import Pong
    from engine.engine import Engine
    from engine.fair_share import FairShare

    engine = Engine(SimulatedExecutor(cost), cost.engine, policy=FairShare())
    folder = PrivateFolder()

    def pong() -> Pong:
        stats = engine.stats
        return Pong(
            ready=True,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            prefill_tokens=stats.prefill_tokens,
            step_base_s=stats.step_base_s,
            step_token_s=stats.step_token_s,
        )

    intake = Intake(
        folder=folder,
        node="n",
        tcp_host=None,
        submit=engine.submit,
        cancel=engine.cancel,
        pong=pong,
        failed=print,
        front_silence_s=30.0,
        heartbeat_s=1.0,
    )
    thread = threading.Thread(target=engine.run_forever, args=(intake.deliver,), daemon=True)
    thread.start()
    intake.start()
    tell.send(intake.address)
    while tell.recv() != "end":
        tell.send(engine.stats)
    engine.stop()
    thread.join(5)
    intake.close()
    folder.close()


def _front(address: Any, port: int, folder: Path) -> None:
    asyncio.run(_serve(address, port, folder))


async def _serve(address: Any, port: int, folder: Path) -> None:
    import uvicorn

    from cluster.config import RouterConfig
    from cluster.directory import ReplicaRecord
    from cluster.health import State
    from cluster.replica_link import ReplicaLink
    from cluster.router import Router
    from serve.drain_gate import DrainGate
    from serve.http.app import create_app
    from serve.model_facts import ModelFacts
    from serve.service import Service
    from serve.text.tokenizer import Tokenizer

    record = ReplicaRecord(id="r", model=MODEL, state=State.READY, address=address)

    class Only:
        known = (record,)

        async def refresh(self) -> tuple[ReplicaRecord, ...]:
            return self.known

    config = RouterConfig(policy="least_loaded", replica_silence_s=30.0)
    router = Router(replicas=Only(), connect=lambda one: ReplicaLink(one, node="n", config=config), config=config)
    await router.open()
    tokenizer = Tokenizer.from_folder(folder)
    gate = DrainGate(
        Service(
            model=ModelFacts.from_checkpoint(folder, name=MODEL, tokenizer=tokenizer),
            tokenizer=tokenizer,
            source=router,
            refusal=router.recent_refusal,
        )
    )
    app = create_app(lambda: gate)
    keep_s = 300  # otherwise a client that reuses a connection while it is being closed sees an error
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off", access_log=False, timeout_keep_alive=keep_s))
    await server.serve()


@dataclass
class SimulatedServer:
    """Both processes, and the pipe for the replica's statistics."""

    url: str
    front: psutil.Process
    replica: psutil.Process
    _pipe: Any

    def stats(self) -> Any:
        self._pipe.send("stats")
        return self._pipe.recv()


@contextlib.contextmanager
def simulated_server(cost: StepCost) -> Iterator[SimulatedServer]:
    from tests.serve.vocabularies import write_smol

    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    with tempfile.TemporaryDirectory() as made:
        folder = write_smol(Path(made))
        sizes = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 4096}))
        replica = spawn.Process(target=_replica, args=(there, cost))
        replica.start()
        port = _free_port()
        front = spawn.Process(target=_front, args=(here.recv(), port, folder))
        front.start()
        try:
            _await_ready(port)
            assert front.pid is not None
            assert replica.pid is not None
            yield SimulatedServer(f"http://127.0.0.1:{port}", psutil.Process(front.pid), psutil.Process(replica.pid), here)
        finally:
            front.terminate()
            front.join(10)
            here.send("end")
            replica.join(10)
            for process in (front, replica):
                process.kill()


def _await_ready(port: int) -> None:
    import httpx

    until = time.monotonic() + 120
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError("the front did not become ready within 120 s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
