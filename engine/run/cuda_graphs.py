"""Kernel launches captured once and replayed as one: in a step of a small model the host's launches dominate."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Compute = Callable[[], None]
Replay = Callable[[], None]
EagerCall = TypeVar("EagerCall")
Piece = tuple[Replay, EagerCall | None]
"""A replay, and what runs eagerly after it; None after the last piece."""


class GraphRecorder(Protocol):
    """Captures what a function launches. Meanwhile the function must not read from the device nor copy from the host.

    A replay does the same on the same memory, whatever it holds by then. All replays share their temporary memory, so none may begin
    while another runs, and results that must survive belong in tensors allocated beforehand.
    """

    def capture(self, compute: Compute) -> Replay:
        """Run the function, then capture it. Ranks that communicate in it must call this at the same time."""
        ...

    def capture_piecewise(self, compute: Callable[[Callable[[EagerCall], None]], None]) -> list[Piece[EagerCall]]:
        """Like `capture`, for a function that ends a piece by passing to its argument what runs eagerly before the next piece."""
        ...


class CapturedGraphs(Protocol):
    """Graphs of the same launches, one for each of several numbers of rows or tokens."""

    @property
    def num_graphs(self) -> int:
        """How often `capture` calls ``after_each``."""
        ...

    def capture(self, after_each: Callable[[], None]) -> None:
        """Capture the graphs, or capture them again: largest first, as its memory suffices for all others.

        All ranks of the replica must call this at the same time.
        """
        ...

    def release(self) -> None:
        """Release the graphs, even if other references to this object remain."""
        ...


class CudaGraphRecorder:
    """Captures CUDA graphs on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, compute: Compute) -> Replay:
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            compute()  # compiles kernels, allocates the libraries' workspaces and connects ranks: none of that may happen during a capture
        here.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local, because NCCL's watchdog thread queries events of the device during a capture.
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
