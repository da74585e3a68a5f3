"""From a checkpoint to one rank's model: check everything, then allocate, then read this rank's share and nothing else."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from threading import Barrier, Event

import torch
from torch import Tensor

from model.attention.choose import BackendName
from model.checkpoint import Checkpoint
from model.checkpoint_header import some
from model.config import ModelConfig
from model.dtypes import DTYPES
from model.names import Binding, WeightedLayer
from model.qwen2 import HEAD, Qwen2
from model.qwen2_moe import Qwen2Moe
from model.stored_quantised import as_plain
from parallel.dispatch import DispatchName
from parallel.embedding import VocabEmbedding
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.pages import freed_at_once
from parallel.weight_format import Dense, ReadsInto, StoredTensor, WeightFormat

OnProgress = Callable[[int, int], None]
"""Told (done, total): bytes of the checkpoint tensors that this rank takes a share of, in whole tensors."""

MOST_THREADS = 8
"""That read and pack at a time: each holds some MB."""
AHEAD_BYTES = 2 * 2**30
"""Of tensors as they are stored, on their way to a CUDA device at a time."""
FAR_AHEAD = 64
"""So many tensors are asked for before the first has come, and no more: all after it are done in vain if it cannot be read."""


class CheckpointMismatch(ValueError):
    """The tensors of a checkpoint are not exactly those of the model its config.json describes."""

    def __init__(
        self,
        *,
        missing: Iterable[str],
        unused: Iterable[str],
        misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
        mistyped: Iterable[str] = (),
        place: str = "the checkpoint",
    ) -> None:
        """``misshapen``: (name, shape in the checkpoint, shape in the model). ``mistyped``: not of floating point."""
        self.missing, self.unused, self.misshapen = tuple(sorted(missing)), tuple(sorted(unused)), tuple(sorted(misshapen))
        self.mistyped, self.place = tuple(sorted(mistyped)), place
        shapes = tuple(f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in self.misshapen)
        parts = (
            ("missing", self.missing),
            ("not used by this model", self.unused),
            ("of the wrong shape", shapes),
            ("of a dtype that is no floating point", self.mistyped),
        )
        found = "; ".join(f"{len(items)} {what}: {some(items)}" for what, items in parts if items)
        super().__init__(f"{place} does not fit its config.json: {found}")

    def __reduce__(self) -> tuple[partial["CheckpointMismatch"], tuple[()]]:
        """Pickled by its fields, so that a rank's error can reach another process."""
        again = partial(
            CheckpointMismatch,
            missing=self.missing,
            unused=self.unused,
            misshapen=self.misshapen,
            mistyped=self.mistyped,
            place=self.place,
        )
        return again, ()


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What loading did on this rank."""

    bytes_read: int
    """Of weights, as stored, that this rank keeps."""
    bytes_fetched: int
    """That left the files or the store for it: headers, and what lies between the columns it keeps, included."""
    bytes_of_checkpoint: int
    """Of all weights in it, whoever reads them."""
    seconds: float
    ignored: tuple[str, ...]
    """Tensors that were there and mean nothing: a copy of the head where config.json ties it to the embedding."""


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    groups: ParallelGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    backend: BackendName = "auto",
    dispatch: DispatchName = "local",
    redundant_experts: int = 0,
    format: WeightFormat | None = None,
    table_format: WeightFormat | None = None,
    kv_dtype: torch.dtype | None = None,
    rounds_kv: bool = False,
    on_progress: OnProgress | None = None,
) -> tuple[Qwen2, LoadReport]:
    """This rank's part of the model, ready to compute. ``format`` holds the large matrices of the layers, ``table_format``
    embedding and head; None: plainly, in ``dtype``. ``kv_dtype``, ``rounds_kv``: see `Qwen2`.

    ``redundant_experts`` is how many routed experts of a layer each ep position holds beyond its even share.

    Raises:
        CheckpointMismatch: seen from names and shapes alone, on every rank, before anything is allocated.
        CheckpointError: a file could not be read, or what is stored quantised in it makes no sense.
        ValueError: more ranks than can share the model's heads.
    """
    started = time.monotonic()
    ignored = check_checkpoint(checkpoint, config, format)
    model = _make(
        config,
        groups,
        device=device,
        dtype=dtype,
        block_tokens=block_tokens,
        backend=backend,
        dispatch=dispatch,
        redundant_experts=redundant_experts,
        format=format,
        table_format=table_format,
        kv_dtype=kv_dtype,
        rounds_kv=rounds_kv,
    )
    bindings = list(model.bindings())
    tensors = as_plain(checkpoint.tensors, config.quantisation, {binding.name for binding in bindings})
    bytes_read = _fill(bindings, tensors, checkpoint.reads_at_a_time, device, on_progress or (lambda _done, _total: None))
    return model.eval().requires_grad_(False), LoadReport(
        bytes_read=bytes_read,
        bytes_fetched=checkpoint.bytes_fetched,
        bytes_of_checkpoint=checkpoint.num_bytes,
        seconds=time.monotonic() - started,
        ignored=ignored,
    )


def _make(
    config: ModelConfig,
    groups: ParallelGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    backend: BackendName,
    dispatch: DispatchName = "local",
    redundant_experts: int = 0,
    format: WeightFormat | None,
    table_format: WeightFormat | None = None,
    kv_dtype: torch.dtype | None = None,
    rounds_kv: bool = False,
) -> Qwen2:
    """One rank's layers, nothing of them allocated."""
    kind = Qwen2 if config.moe is None else Qwen2Moe
    return kind(
        config,
        groups,
        device=device,
        dtype=dtype,
        format=format or Dense(dtype),
        table_format=table_format,
        backend=backend,
        dispatch=dispatch,
        redundant_experts=redundant_experts,
        block_tokens=block_tokens,
        kv_dtype=kv_dtype,
        rounds_kv=rounds_kv,
    )


def check_checkpoint(checkpoint: Checkpoint, config: ModelConfig, format: WeightFormat | None = None) -> tuple[str, ...]:
    """Hold the headers against the whole model, so that every rank of every stage comes to the same end. Allocates nothing.

    Where config.json ties the head to the embedding, a `lm_head.weight` that is stored nevertheless is not read, whatever
    it holds: config.json decides, as it does for transformers. Returns such names.

    Raises:
        CheckpointMismatch: missing, superfluous, misshapen tensors, and for a plain model those of integers.
        CheckpointError: a matrix that is stored quantised lacks a part, or its parts do not fit each other.
    """
    dtype, device = DTYPES[config.dtype], torch.device("cpu")
    whole = _make(config, single_rank_groups(), device=device, dtype=dtype, block_tokens=1, backend="reference", format=format)
    plain = format is None or set(format.specs()) == {"weight"}
    wanted = {binding.name: binding.slot.shape for binding in whole.bindings()}
    tensors = as_plain(checkpoint.tensors, config.quantisation, wanted)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    ignored = {f"{HEAD}.weight"} & found.keys() if whole.config.tied_embeddings else set()
    missing, unused = wanted.keys() - found.keys(), found.keys() - wanted.keys() - ignored
    misshapen = [(name, found[name], shape) for name, shape in wanted.items() if name in found and found[name] != shape]
    mistyped = [name for name in wanted.keys() & found.keys() if plain and tensors[name].dtype not in DTYPES.values()]
    if missing or unused or misshapen or mistyped:
        raise CheckpointMismatch(missing=missing, unused=unused, misshapen=misshapen, mistyped=mistyped, place=str(checkpoint.place))
    return tuple(ignored)


def _fill(
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
    on_device = device.type == "cuda"
    bindings = sorted(bindings, key=lambda binding: not isinstance(binding.layer, VocabEmbedding))
    total = sum(tensors[binding.name].num_bytes for binding in bindings if binding.is_wanted)
    done = bytes_read = 0
    on_progress(done, total)
    under_way: deque[tuple[Binding, Future[int]]] = deque()
    filled: list[WeightedLayer] = []
    begun: deque[tuple[WeightedLayer, int]] = deque()
    """Layers that are not brought into their form yet, and of how many tensors of all the last of theirs is."""
    num_begun = num_settled = bytes_under_way = 0
    cores, given_up = torch.get_num_threads(), Event()

    def finish_those_that_came() -> None:
        while begun and begun[0][1] <= num_settled:
            begun.popleft()[0].finish()

    def settle(most: int, most_bytes: float = math.inf) -> None:
        """Wait until no more than so many are under way, and bytes of them."""
        nonlocal done, bytes_read, num_settled, bytes_under_way
        finish_those_that_came()  # also those of which this rank wants nothing
        while len(under_way) > most or bytes_under_way > most_bytes:
            binding, read = under_way.popleft()
            bytes_read += read.result()
            num_bytes = tensors[binding.name].num_bytes
            done, num_settled, bytes_under_way = done + num_bytes, num_settled + 1, bytes_under_way - num_bytes
            on_progress(done, total)
            finish_those_that_came()

    with (
        freed_at_once(),
        _threads(max(reads_at_a_time, min(cores, MOST_THREADS)), 1, given_up) as alone,
        _threads(reads_at_a_time, max(1, cores // reads_at_a_time), given_up) as together,
    ):
        for layer, of_layer in groupby(bindings, key=lambda binding: binding.layer):
            layer.allocate(device)
            for binding in of_layer:
                if binding.is_wanted:
                    tensor = tensors[binding.name]
                    stored = _WantedInto(tensor, given_up) if isinstance(tensor, ReadsInto) else _Wanted(tensor, given_up)
                    threads = alone if layer.takes_pieces or on_device else together
                    under_way.append((binding, threads.submit(layer.load, binding.slot.part, binding.slot.tensor, stored)))
                    num_begun, bytes_under_way = num_begun + 1, bytes_under_way + stored.num_bytes
                    if layer.takes_pieces:
                        settle(FAR_AHEAD)
                    elif on_device:
                        settle(FAR_AHEAD, AHEAD_BYTES)
                    else:
                        settle(reads_at_a_time - 1)
            if layer.takes_pieces:
                filled.append(layer)
            else:
                begun.append((layer, num_begun))
                settle(FAR_AHEAD if on_device else 0)
        settle(0)
    for layer in filled:
        layer.finish()
    return bytes_read


@contextmanager
def _threads(count: int, cores: int, given_up: Event) -> Iterator[ThreadPoolExecutor]:
    """Threads of which each computes with so many of torch's. What they are at when the block ends by an error is ``given_up``.

    torch's setting is a thread's own, but one that has not met torch yet begins with what was set last, by whichever thread. So all of
    these are made at once, and what was set before is set again before anything is loaded: others may begin meanwhile.
    """
    before, made = torch.get_num_threads(), Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # torch is met here: else it would be at the first tensor, after what is set now
        torch.set_num_threads(cores)
        made.wait()

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
        given_up.set()
        threads.shutdown(cancel_futures=True)


class _GivenUp(Exception):
    """Nobody waits for it any more."""


@dataclass(frozen=True)
class _Wanted:
    """A `StoredTensor` that can be read until it is ``given_up``: an error, or the end of the process, then waits for the pieces that are
    under way and not for whole tensors."""

    stored: StoredTensor
    given_up: Event

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
        if self.given_up.is_set():
            raise _GivenUp
        return self.stored.read(*slices)


@dataclass(frozen=True)
class _WantedInto(_Wanted):
    """The same of one whose bytes need nothing in between."""

    stored: ReadsInto

    def read_into(self, place: Tensor, *slices: slice) -> None:
        if self.given_up.is_set():
            raise _GivenUp
        self.stored.read_into(place, *slices)
