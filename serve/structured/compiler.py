"""Compiles clients' grammars in separate processes (`compiler_process`), so that hostile ones harm neither front nor ranks."""

import asyncio
import json
import os
import select
import signal
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
"""How long a process may take to start and read the vocabulary."""
BUSY_FACTOR = 5.0
"""The wait for a result is this many times the CPU time that compiling may take, because the host may be overloaded."""
NUM_PROCESSES = 2
"""While one is killed because of a hostile grammar, the other still works."""


class CompilerBroken(EngineError):
    """The compiler process did not start, or was ended by somebody else."""


class GrammarCompiler(Protocol):
    """Compiles grammars. `GrammarCompilerPool` implements it; tests have their own."""

    async def compile(self, kind: str, text: str) -> "CompileResult": ...
    async def warm_up(self) -> None: ...


@dataclass(frozen=True, slots=True)
class CompileResult:
    """Exactly one of the two fields is set."""

    grammar: str | None = None
    """For `SamplingParams.grammar`."""
    error: str | None = None


class GrammarCompilerPool:
    """Compiler processes for one model's vocabulary, started when first needed and ended with this object. Caches their results."""

    def __init__(self, folder: Path, limits: Limits, *, num_processes: int = NUM_PROCESSES) -> None:
        self._folder, self._limits = folder, limits
        self._results: OrderedDict[tuple[str, str], CompileResult] = OrderedDict()
        self._result_bytes = 0
        self._lock = threading.Lock()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        """By the thread that uses it."""
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="grammar-compiler")
        weakref.finalize(self, _end_all, self._processes)

    async def compile(self, kind: str, text: str) -> CompileResult:
        """The result, after at most `Limits.grammar_compile_s` of CPU time.

        Raises:
            CompilerBroken: the process cannot be started, or was ended or kept from working by something else than the grammar.
        """
        with self._lock:
            if (known := self._results.get((kind, text))) is not None:
                self._results.move_to_end((kind, text))
                return known
        result = await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, kind, text)
        self._remember((kind, text), result)
        return result

    async def warm_up(self) -> None:
        """Start a process, so that the first client need not wait for it."""
        await self.compile("lark", 'start: "a"')

    def close(self) -> None:
        """End the processes. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        _end_all(self._processes)

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes.values())

    def _ask(self, kind: str, text: str) -> CompileResult:
        process = self._process()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"kind": kind, "text": text}).encode() + b"\n")
            process.stdin.flush()
            answer = _line(process, BUSY_FACTOR * self._limits.grammar_compile_s)  # the process ends itself before that
        except OSError:
            answer = None
        if answer is None:
            if self._end() == -signal.SIGKILL:  # by us after the wait, by the host for lack of memory, or by hand; never by its own limits
                raise CompilerBroken("the grammar compiler was killed while it worked")
            seconds = self._limits.grammar_compile_s
            return CompileResult(error=f"it takes more than {seconds:g} s or too much memory to compile; make it smaller")
        return CompileResult(grammar=answer.get("grammar"), error=answer.get("error"))

    def _process(self) -> "subprocess.Popen[bytes]":
        """The process of this thread, started if there is none."""
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

    def _end(self) -> int | None:
        """End this thread's process. Returns how it ended, as `subprocess.Popen.returncode`; an earlier end counts."""
        process = self._processes.pop(threading.get_ident(), None)
        if process is not None:
            _end(process)
        return None if process is None else process.returncode

    def _remember(self, key: tuple[str, str], result: CompileResult) -> None:
        with self._lock:
            if key in self._results:
                return
            self._results[key] = result
            self._result_bytes += _size(key, result)
            while self._result_bytes > self._limits.grammar_cache_bytes:
                oldest, dropped = self._results.popitem(last=False)
                self._result_bytes -= _size(oldest, dropped)


def _size(key: tuple[str, str], result: CompileResult) -> int:
    return 512 + sum(len(text.encode()) for text in (*key, result.grammar or "", result.error or ""))


def _line(process: "subprocess.Popen[bytes]", timeout_s: float) -> dict[str, Any] | None:
    """The next line of its output; None if it ends, or writes no line within ``timeout_s``."""
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
