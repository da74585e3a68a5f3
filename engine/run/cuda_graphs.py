"""Launches that are recorded once and replayed as one: a step of a small model is launches more than anything else."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Compute = Callable[[], None]
Replay = Callable[[], None]
EagerCall = TypeVar("EagerCall")
Piece = tuple[Replay, EagerCall | None]
"""A replay, and what is to be done behind it; nothing behind the last."""


class GraphRecorder(Protocol):
    """Records what a function launches. While it does, the function may ask nothing of the device and bring nothing from the host.

    A replay does the same on the same memory, whatever lies there now. All replays share what memory they need on the way, so none
    may begin while another runs, and results must be where they outlast it: in tensors that were there before.
    """

    def capture(self, compute: Compute) -> Replay:
        """Do it, then record it. On all ranks with which it talks at the same time."""
        ...

    def capture_piecewise(self, compute: Callable[[Callable[[EagerCall], None]], None]) -> list[Piece[EagerCall]]:
        """As `capture`, of a function that says where a piece ends and what, unrecorded, comes before the next."""
        ...


class CapturedGraphs(Protocol):
    """Launches of some kind, recorded for some numbers of rows or tokens."""

    @property
    def num_graphs(self) -> int:
        """How often `capture` calls ``after_each``."""
        ...

    def capture(self, after_each: Callable[[], None]) -> None:
        """Record them, anew if it has been done: the largest first, whose memory is enough for all. On all ranks of the replica at the
        same time."""
        ...

    def release(self) -> None:
        """Let go of what was captured, whoever else still knows of this."""
        ...


class CudaGraphRecorder:
    """CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, compute: Compute) -> Replay:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            compute()  # compiles kernels, makes libraries take their memory and connect: none of that may happen in a capture
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks the device for events while this thread captures.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            compute()
        return graph.replay

    def capture_piecewise(self, compute: Callable[[Callable[[EagerCall], None]], None]) -> list[Piece[EagerCall]]:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        pieces: list[Piece[EagerCall]] = []
        with torch.cuda.stream(self._stream):
            compute(lambda _between: None)
            torch.cuda.synchronize(self._device)
            graph = self._begin_capture()

            def cut(between: EagerCall) -> None:
                nonlocal graph
                graph.capture_end()
                pieces.append((graph.replay, between))
                graph = self._begin_capture()

            try:
                compute(cut)
            finally:
                graph.capture_end()
            pieces.append((graph.replay, None))
        here.wait_stream(self._stream)
        return pieces

    def _begin_capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph
