"""Fills a rank's layers from a checkpoint, with several threads and bounded read-ahead."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from threading import Barrier, Event

import torch
from torch import Tensor

from model.weight_names import Binding, WeightedLayer
from parallel.embedding import VocabEmbedding
from parallel.host_memory import return_freed_memory
from parallel.weight_format import ReadableInto, StoredTensor

OnProgress = Callable[[int, int], None]
"""Called with (done, total): bytes of the checkpoint tensors that this rank needs a share of, counting whole tensors."""

MAX_THREADS = 8
"""Threads that read and pack; each needs some MB."""
READ_AHEAD_BYTES = 2 * 2**30
"""Bytes of tensors, as stored, that are on their way to a CUDA device at a time."""
MAX_TENSORS_AHEAD = 64
"""Tensors that are read ahead before the first has arrived. If that one cannot be read, the others were read in vain."""


def load_layers(
    bindings: list[Binding], tensors: Mapping[str, StoredTensor], concurrent_reads: int, device: torch.device, on_progress: OnProgress
) -> int:
    """Load layer by layer, several tensors at a time. Returns the bytes read.

    A layer that holds its weights as stored until all of them have arrived is converted before the next layer is allocated, in threads that
    share torch's cores. Layers that convert each piece on arrival are filled concurrently, one thread per tensor.

    On a CUDA device the next layers are read while a layer is converted: up to `READ_AHEAD_BYTES` of their weights, as stored, are on the
    device beside it.

    Embedding and head come first: they are the largest, and the temporary memory for quantising them is free again before memory fills
    up.
    """
    bindings = sorted(bindings, key=lambda binding: not isinstance(binding.layer, VocabEmbedding))
    loading = _PendingReads(sum(tensors[binding.name].num_bytes for binding in bindings if binding.is_wanted), on_progress)
    on_device, cores, cancelled = device.type == "cuda", torch.get_num_threads(), Event()
    filled: list[WeightedLayer] = []
    with (
        return_freed_memory(),
        _threads(max(concurrent_reads, min(cores, MAX_THREADS)), 1, cancelled, device) as alone,
        _threads(concurrent_reads, max(1, cores // concurrent_reads), cancelled, device) as together,
    ):
        for layer, of_layer in groupby(bindings, key=lambda binding: binding.layer):
            layer.allocate(device)
            threads = alone if layer.is_streaming or on_device else together
            for slot, stored in ((binding.slot, tensors[binding.name]) for binding in of_layer if binding.is_wanted):
                wanted = _CancellableInto(stored, cancelled) if isinstance(stored, ReadableInto) else _Cancellable(stored, cancelled)
                loading.begin(threads.submit(layer.load, slot.part, slot.tensor, wanted), stored.num_bytes)
                if layer.is_streaming:
                    loading.wait_until(MAX_TENSORS_AHEAD)
                elif on_device:
                    loading.wait_until(MAX_TENSORS_AHEAD, READ_AHEAD_BYTES)
                else:
                    loading.wait_until(concurrent_reads - 1)
            if layer.is_streaming:
                filled.append(layer)
            else:
                loading.finish_when_loaded(layer)
                loading.wait_until(MAX_TENSORS_AHEAD if on_device else 0)
        loading.wait_until(0)
    for layer in filled:
        layer.finish()
    return loading.bytes_read


class _PendingReads:
    """Tensors that are being read, in order, and layers that wait for theirs."""

    def __init__(self, total_bytes: int, on_progress: OnProgress) -> None:
        self.bytes_read = 0
        self._total_bytes, self._on_progress = total_bytes, on_progress
        self._pending: deque[tuple[Future[int], int]] = deque()
        self._num_begun = self._num_arrived = self._bytes_arrived = self._bytes_pending = 0
        self._waiting: deque[tuple[WeightedLayer, int]] = deque()
        """Layers that are not converted yet, and the ordinal of their last tensor."""
        on_progress(0, total_bytes)

    def begin(self, read: Future[int], num_bytes: int) -> None:
        """A tensor of so many bytes is being read. The future returns how many of them this rank keeps."""
        self._pending.append((read, num_bytes))
        self._num_begun += 1
        self._bytes_pending += num_bytes

    def finish_when_loaded(self, layer: WeightedLayer) -> None:
        """Convert the layer once everything that was begun so far has arrived."""
        self._waiting.append((layer, self._num_begun))

    def wait_until(self, max_tensors: int, max_bytes: float = math.inf) -> None:
        """Wait until no more than so many tensors and bytes are being read. Raises what reading raised."""
        self._finish()  # also layers of which this rank needs nothing
        while len(self._pending) > max_tensors or self._bytes_pending > max_bytes:
            read, num_bytes = self._pending.popleft()
            self.bytes_read += read.result()
            self._num_arrived += 1
            self._bytes_arrived += num_bytes
            self._bytes_pending -= num_bytes
            self._on_progress(self._bytes_arrived, self._total_bytes)
            self._finish()

    def _finish(self) -> None:
        while self._waiting and self._waiting[0][1] <= self._num_arrived:
            self._waiting.popleft()[0].finish()


@contextmanager
def _threads(count: int, cores: int, cancelled: Event, device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute with ``cores`` of torch's threads, on ``device``.

    If the block ends with an error, their reads are ``cancelled``.

    The current CUDA device is a property of the thread, and a new thread starts with the first one: in these threads Triton kernels
    quantise experts, and are launched on the current device whatever their tensors are on.

    torch's number of threads is a property of the thread too, but a thread that has not used torch yet takes the value that any thread
    set last. So all threads are created at once, and the old value is restored before anything is loaded, because other threads may
    start meanwhile.
    """
    before, made = torch.get_num_threads(), Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # initialises torch in this thread, which would otherwise happen at the first tensor and undo the next line
        torch.set_num_threads(cores)
        made.wait()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    threads = ThreadPoolExecutor(count, thread_name_prefix="load", initializer=begin)
    try:
        for _ in range(count):
            threads.submit(int)  # creates a thread each time, because none has finished its first task
        made.wait()
    except BaseException:  # a thread could not be created, or this one was interrupted: release those that wait
        made.abort()
        raise
    finally:
        torch.set_num_threads(before)
    try:
        yield threads
    finally:
        cancelled.set()
        threads.shutdown(cancel_futures=True)


class _Cancelled(Exception):
    """The caller no longer waits for it."""


@dataclass(frozen=True)
class _Cancellable:
    """A `StoredTensor` whose reads fail once ``cancelled`` is set: after an error, or at the end of the process, only the pieces in
    progress are waited for, not whole tensors."""

    stored: StoredTensor
    cancelled: Event

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def num_bytes(self) -> int:
        return self.stored.num_bytes

    @property
    def piece_dim(self) -> int:
        return self.stored.piece_dim

    @property
    def piece_bytes(self) -> int:
        return self.stored.piece_bytes

    def read(self, *slices: slice) -> Tensor:
        if self.cancelled.is_set():
            raise _Cancelled
        return self.stored.read(*slices)


@dataclass(frozen=True)
class _CancellableInto(_Cancellable):
    """The same for a tensor that can be read into its destination."""

    stored: ReadableInto

    def read_into(self, target: Tensor, *slices: slice) -> None:
        if self.cancelled.is_set():
            raise _Cancelled
        self.stored.read_into(target, *slices)
