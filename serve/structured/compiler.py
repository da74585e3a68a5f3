"""The fronts' side of `compiler_process`: a client's grammar becomes one that ranks can be trusted with, or a refusal."""

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.errors import EngineError
from serve.limits import Limits

START_S = 60.0
"""How long a process may take to read the vocabulary."""
BUSY = 5.0
"""On a host with many times more to do than it has cores, so much longer is waited than compiling may take of one."""
NUM_PROCESSES = 2
"""While one is ended over a hostile grammar, the other goes on."""


class CompilerBroken(EngineError):
    """The compiling process did not start."""


class Compiles(Protocol):
    """Judges grammars. `GrammarCompilers` does; tests have others."""

    async def compile(self, kind: str, text: str) -> "Verdict": ...
    async def warm_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a grammar: one of the two."""

    grammar: str | None = None
    """For `SamplingParams.grammar`."""
    error: str | None = None


class GrammarCompilers:
    """Processes for one model's vocabulary, started when first needed and ended with this object."""

    def __init__(self, folder: Path, limits: Limits, *, num_processes: int = NUM_PROCESSES) -> None:
        self._folder, self._limits = folder, limits
        self._verdicts: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._verdict_bytes = 0
        self._lock = threading.Lock()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        """By the thread that speaks with it."""
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="grammar-compiler")
        weakref.finalize(self, _end_all, self._processes)

    async def compile(self, kind: str, text: str) -> Verdict:
        """A verdict, after `Limits.grammar_compile_s` of a CPU at the latest.

        Raises:
            CompilerBroken: the process cannot be started.
        """
        with self._lock:
            if (known := self._verdicts.get((kind, text))) is not None:
                self._verdicts.move_to_end((kind, text))
                return known
        verdict = await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, kind, text)
        self._remember((kind, text), verdict)
        return verdict

    async def warm_up(self) -> None:
        """Start a process, so that the first client does not wait for it."""
        await self.compile("lark", 'start: "a"')

    def close(self) -> None:
        """End the processes. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        _end_all(self._processes)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes.values())

    def _ask(self, kind: str, text: str) -> Verdict:
        process = self._process()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"kind": kind, "text": text}).encode() + b"\n")
            process.stdin.flush()
            answer = _line(process, BUSY * self._limits.grammar_compile_s)  # it ends itself before
        except OSError:
            answer = None
        if answer is None:
            self._end()
            seconds = self._limits.grammar_compile_s
            return Verdict(error=f"it takes more than {seconds:g} s or too much memory to compile; make it smaller")
        return Verdict(grammar=answer.get("grammar"), error=answer.get("error"))

    def _process(self) -> "subprocess.Popen[bytes]":
        """That of this thread."""
        process = self._processes.get(threading.get_ident())
        if process is not None and process.poll() is None:
            return process
        limits = self._limits
        arguments = [str(self._folder), str(limits.grammar_compile_s), str(limits.grammar_memory_bytes)]
        process = subprocess.Popen(  # noqa: S603  (our own module)
            [sys.executable, "-m", "serve.structured.compiler_process", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        self._processes[threading.get_ident()] = process
        answer = _line(process, START_S)
        if answer is None or "ready" not in answer:
            self._end()
            raise CompilerBroken((answer or {}).get("error", "the grammar compiler did not start"))
        return process

    def _end(self) -> None:
        process = self._processes.pop(threading.get_ident(), None)
        if process is not None:
            _end(process)

    def _remember(self, key: tuple[str, str], verdict: Verdict) -> None:
        with self._lock:
            if key in self._verdicts:
                return
            self._verdicts[key] = verdict
            self._verdict_bytes += _size(key, verdict)
            while self._verdict_bytes > self._limits.grammar_cache_bytes:
                oldest, dropped = self._verdicts.popitem(last=False)
                self._verdict_bytes -= _size(oldest, dropped)


def _size(key: tuple[str, str], verdict: Verdict) -> int:
    return 512 + sum(len(text.encode()) for text in (*key, verdict.grammar or "", verdict.error or ""))


def _line(process: "subprocess.Popen[bytes]", timeout_s: float) -> dict[str, Any] | None:
    """The next line that it writes, whole; None if it ends or says nothing in time."""
    assert process.stdout is not None
    read = b""
    end = time.monotonic() + timeout_s
    while not read.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, end - time.monotonic()))
        piece = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
        if not piece:
            return None
        read += piece
    answer: dict[str, Any] = json.loads(read)
    return answer


def _end_all(processes: "dict[int, subprocess.Popen[bytes]]") -> None:
    while processes:
        _, process = processes.popitem()
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
