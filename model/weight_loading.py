"""A rank's layers are filled from a checkpoint: what is read beside what, by how many threads, and how far ahead."""

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
from parallel.weight_format import ReadsInto, StoredTensor

OnProgress = Callable[[int, int], None]
"""Told (done, total): bytes of the checkpoint tensors that this rank takes a share of, in whole tensors."""

MAX_THREADS = 8
"""That read and pack at a time: each holds some MB."""
AHEAD_BYTES = 2 * 2**30
"""Of tensors as they are stored, on their way to a CUDA device at a time."""
FAR_AHEAD = 64
"""So many tensors are asked for before the first has come, and no more: all after it are done in vain if it cannot be read."""


def load_layers(
    bindings: list[Binding], tensors: Mapping[str, StoredTensor], reads_at_a_time: int, device: torch.device, on_progress: OnProgress
) -> int:
    """Load layer after layer, some tensors at a time. A layer that holds its weights as they are stored until all are there takes its
    final form before the next is allocated, in threads that share out what they compute; those that take them piece by piece are filled
    beside each other, each tensor by a thread of its own.

    To a CUDA device the next layers are on their way while a layer is brought into its form: some of what they hold as it is stored,
    `AHEAD_BYTES`, lies there beside it.

    Embedding and head come first: they are the largest, and what rounding them takes beside them is gone when memory fills up.
    Returns the bytes read.
    """
    bindings = sorted(bindings, key=lambda binding: not isinstance(binding.layer, VocabEmbedding))
    loading = _PendingReads(sum(tensors[binding.name].num_bytes for binding in bindings if binding.is_wanted), on_progress)
    on_device, cores, cancelled = device.type == "cuda", torch.get_num_threads(), Event()
    filled: list[WeightedLayer] = []
    with (
        return_freed_memory(),
        _threads(max(reads_at_a_time, min(cores, MAX_THREADS)), 1, cancelled, device) as alone,
        _threads(reads_at_a_time, max(1, cores // reads_at_a_time), cancelled, device) as together,
    ):
        for layer, of_layer in groupby(bindings, key=lambda binding: binding.layer):
            layer.allocate(device)
            threads = alone if layer.takes_pieces or on_device else together
            for slot, stored in ((binding.slot, tensors[binding.name]) for binding in of_layer if binding.is_wanted):
                wanted = _CancellableInto(stored, cancelled) if isinstance(stored, ReadsInto) else _Cancellable(stored, cancelled)
                loading.begin(threads.submit(layer.load, slot.part, slot.tensor, wanted), stored.num_bytes)
                if layer.takes_pieces:
                    loading.settle(FAR_AHEAD)
                elif on_device:
                    loading.settle(FAR_AHEAD, AHEAD_BYTES)
                else:
                    loading.settle(reads_at_a_time - 1)
            if layer.takes_pieces:
                filled.append(layer)
            else:
                loading.finish_when_loaded(layer)
                loading.settle(FAR_AHEAD if on_device else 0)
        loading.settle(0)
    for layer in filled:
        layer.finish()
    return loading.bytes_read


class _PendingReads:
    """Tensors that were asked for, in order, and layers that wait for theirs."""

    def __init__(self, total_bytes: int, on_progress: OnProgress) -> None:
        self.bytes_read = 0
        self._total_bytes, self._on_progress = total_bytes, on_progress
        self._under_way: deque[tuple[Future[int], int]] = deque()
        self._num_begun = self._num_come = self._bytes_come = self._bytes_under_way = 0
        self._waiting: deque[tuple[WeightedLayer, int]] = deque()
        """Layers that are not brought into their form yet, and of how many tensors of all the last of theirs is."""
        on_progress(0, total_bytes)

    def begin(self, read: Future[int], num_bytes: int) -> None:
        """A tensor of so many bytes is being read; the future tells how many of them this rank keeps."""
        self._under_way.append((read, num_bytes))
        self._num_begun += 1
        self._bytes_under_way += num_bytes

    def finish_when_loaded(self, layer: WeightedLayer) -> None:
        """Bring it into its form when all has come that was begun up to now."""
        self._waiting.append((layer, self._num_begun))

    def settle(self, most: int, most_bytes: float = math.inf) -> None:
        """Wait until no more than so many are under way, and bytes of them. Raises what reading raised."""
        self._finish()  # also those of which this rank wants nothing
        while len(self._under_way) > most or self._bytes_under_way > most_bytes:
            read, num_bytes = self._under_way.popleft()
            self.bytes_read += read.result()
            self._num_come += 1
            self._bytes_come += num_bytes
            self._bytes_under_way -= num_bytes
            self._on_progress(self._bytes_come, self._total_bytes)
            self._finish()

    def _finish(self) -> None:
        while self._waiting and self._waiting[0][1] <= self._num_come:
            self._waiting.popleft()[0].finish()


@contextmanager
def _threads(count: int, cores: int, cancelled: Event, device: torch.device) -> Iterator[ThreadPoolExecutor]:
    """Threads of which each computes with so many of torch's, on ``device``. What they are at when the block ends by an error is
    ``cancelled``.

    The current device is a thread's own, and of a new one the first: experts are rounded in these threads by kernels that Triton launches
    there, whatever device their tensors are on.

    torch's setting is a thread's own, but one that has not met torch yet begins with what was set last, by whichever thread. So all of
    these are made at once, and what was set before is set again before anything is loaded: others may begin meanwhile.
    """
    before, made = torch.get_num_threads(), Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # torch is met here: else it would be at the first tensor, after what is set now
        torch.set_num_threads(cores)
        made.wait()
        if device.type == "cuda":
            torch.cuda.set_device(device)

    threads = ThreadPoolExecutor(count, thread_name_prefix="load", initializer=begin)
    try:
        for _ in range(count):
            threads.submit(int)  # nothing: a thread is made for each, as none has come to an end of its first
        made.wait()
    except BaseException:  # no further thread could be made, or this one was interrupted: let those go that wait for it
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
    """Nobody waits for it any more."""


@dataclass(frozen=True)
class _Cancellable:
    """A `StoredTensor` that can be read until it is ``cancelled``: an error, or the end of the process, then waits for the pieces that are
    under way and not for whole tensors."""

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
    """The same of one whose bytes need nothing in between."""

    stored: ReadsInto

    def read_into(self, place: Tensor, *slices: slice) -> None:
        if self.cancelled.is_set():
            raise _Cancelled
        self.stored.read_into(place, *slices)
