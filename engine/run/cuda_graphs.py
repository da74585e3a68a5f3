"""Launches that are recorded once and replayed as one: a step of a small model is launches more than anything else."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Compute = Callable[[], None]
Replay = Callable[[], None]
Between = TypeVar("Between")
Piece = tuple[Replay, Between | None]
"""A replay, and what is to be done behind it; nothing behind the last."""


class Graphs(Protocol):
    """Records what a function launches. While it does, the function may ask nothing of the device and bring nothing from the host.

    A replay does the same on the same memory, whatever lies there now. All replays share what memory they need on the way, so none
    may begin while another runs, and results must be where they outlast it: in tensors that were there before.
    """

    def capture(self, compute: Compute) -> Replay:
        """Do it, then record it. On all ranks with which it talks at the same time."""
        ...

    def capture_pieces(self, compute: Callable[[Callable[[Between], None]], None]) -> list[Piece[Between]]:
        """As `capture`, of a function that says where a piece ends and what, unrecorded, comes before the next."""
        ...


class Captured(Protocol):
    """Launches of some kind, recorded for some numbers of rows or tokens."""

    @property
    def num_graphs(self) -> int:
        """How often `capture` calls ``after_each``."""
        ...

    def capture(self, after_each: Callable[[], None]) -> None:
        """Record them, anew if it has been done: the largest first, whose memory is enough for all. On all ranks of the replica at the
        same time."""
        ...

    def forget(self) -> None:
        """Let go of what was captured, whoever else still knows of this."""
        ...


class CudaGraphs:
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

    def capture_pieces(self, compute: Callable[[Callable[[Between], None]], None]) -> list[Piece[Between]]:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        pieces: list[Piece[Between]] = []
        with torch.cuda.stream(self._stream):
            compute(lambda _between: None)
            torch.cuda.synchronize(self._device)
            graph = self._begun()

            def cut(between: Between) -> None:
                nonlocal graph
                graph.capture_end()
                pieces.append((graph.replay, between))
                graph = self._begun()

            try:
                compute(cut)
            finally:
                graph.capture_end()
            pieces.append((graph.replay, None))
        here.wait_stream(self._stream)
        return pieces

    def _begun(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph
