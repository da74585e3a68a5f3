"""Loads one rank's part of a model: check the whole checkpoint, allocate, then read only this rank's share."""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from model.adapter import Adapter
from model.adapter_config import AdapterError
from model.attention.choose import BackendName
from model.checkpoint import Checkpoint
from model.checkpoint_header import first_few
from model.config import ModelConfig
from model.dtypes import DTYPES
from model.quantised_tensor import dequantised_tensors
from model.qwen2 import HEAD, Qwen2
from model.qwen2_moe import Qwen2Moe
from model.weight_loading import OnProgress, load_layers
from parallel.dispatch import DispatchName
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.weight_format import Dense, StoredTensor, WeightFormat


class CheckpointMismatch(ValueError):
    """The tensors of a checkpoint are not exactly those of the model that its config.json describes."""

    def __init__(
        self,
        *,
        missing: Iterable[str],
        unused: Iterable[str],
        misshapen: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]] = (),
        mistyped: Iterable[str] = (),
        location: str = "the checkpoint",
    ) -> None:
        """``misshapen``: (name, shape in the checkpoint, shape in the model). ``mistyped``: tensors that are not floating point."""
        self.missing, self.unused, self.misshapen = tuple(sorted(missing)), tuple(sorted(unused)), tuple(sorted(misshapen))
        self.mistyped, self.location = tuple(sorted(mistyped)), location
        shapes = tuple(f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in self.misshapen)
        parts = (
            ("missing", self.missing),
            ("not used by this model", self.unused),
            ("of the wrong shape", shapes),
            ("not of a floating-point dtype", self.mistyped),
        )
        found = "; ".join(f"{len(items)} {what}: {first_few(items)}" for what, items in parts if items)
        super().__init__(f"{location} does not fit its config.json: {found}")

    def __reduce__(self) -> tuple[partial["CheckpointMismatch"], tuple[()]]:
        """Pickle the fields, so that a rank's error can reach another process."""
        again = partial(
            CheckpointMismatch,
            missing=self.missing,
            unused=self.unused,
            misshapen=self.misshapen,
            mistyped=self.mistyped,
            location=self.location,
        )
        return again, ()


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What was loaded on this rank."""

    bytes_read: int
    """Of weights, as stored, that this rank keeps."""
    bytes_fetched: int
    """Read from files or a remote store, including headers and gaps that were read along."""
    bytes_of_checkpoint: int
    """Of all weights in the checkpoint."""
    seconds: float
    ignored: tuple[str, ...]
    """Tensors that were present but not used: a copy of the head if config.json ties it to the embedding."""


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    groups: ParallelGroups,
    *,
    device: torch.device,
    dtype: torch.dtype,
    block_tokens: int,
    adapter: Adapter | None = None,
    backend: BackendName = "auto",
    dispatch: DispatchName = "local",
    redundant_experts: int = 0,
    format: WeightFormat | None = None,
    table_format: WeightFormat | None = None,
    kv_dtype: torch.dtype | None = None,
    kv_may_be_bfloat16: bool = False,
    on_progress: OnProgress | None = None,
) -> tuple[Qwen2, LoadReport]:
    """This rank's part of the model, ready to compute.

    ``format`` holds the large matrices of the layers, ``table_format`` embedding and head (None: not quantised, in ``dtype``).
    ``kv_dtype``, ``kv_may_be_bfloat16``: see `Qwen2`. ``adapter`` is merged into the weights as they are read, before they are converted to
    their format. ``redundant_experts``: how many routed experts of a layer each ep position holds beyond its even share.

    Raises:
        CheckpointMismatch: found from names and shapes alone, on every rank, before anything is allocated.
        CheckpointError: a file could not be read, or quantised data in it is inconsistent.
        AdapterError: the adapter is of another model.
        ValueError: there are more ranks than can share the model's heads.
    """
    started = time.monotonic()
    ignored = check_checkpoint(checkpoint, config, format, adapter)
    model = _make(
        _adapted(config, adapter),
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
        kv_may_be_bfloat16=kv_may_be_bfloat16,
    )
    bindings = list(model.bindings())
    tensors = _tensors(checkpoint, config, adapter, {binding.name for binding in bindings})
    bytes_read = load_layers(bindings, tensors, checkpoint.concurrent_reads, device, on_progress or (lambda _done, _total: None))
    if model.head is not None:
        model.head.enable_screening()
    return model.eval().requires_grad_(False), LoadReport(
        bytes_read=bytes_read,
        bytes_fetched=checkpoint.bytes_fetched + (adapter.bytes_fetched if adapter else 0),
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
    kv_may_be_bfloat16: bool = False,
) -> Qwen2:
    """One rank's layers, unallocated."""
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
        kv_may_be_bfloat16=kv_may_be_bfloat16,
    )


def _adapted(config: ModelConfig, adapter: Adapter | None) -> ModelConfig:
    unties = adapter is not None and adapter.unties_head and not config.is_bare
    return replace(config, tied_embeddings=False) if unties else config


def _tensors(checkpoint: Checkpoint, config: ModelConfig, adapter: Adapter | None, wanted: Collection[str]) -> Mapping[str, StoredTensor]:
    """The tensors by the names of an unquantised model, with the adapter merged.

    ``config`` is the base's; ``wanted``: the model's tensors.
    """
    if adapter is not None and config.quantisation is not None:
        raise AdapterError(
            f"{checkpoint.location} is stored by {config.quantisation.method.upper()}, and what an adapter adds would be rounded to its "
            f"{config.quantisation.bits} bits: serve the adapter with the plain base, and add --quantize int8 or int4 if memory is short"
        )
    plain = dequantised_tensors(checkpoint.tensors, config.quantisation, wanted)
    if adapter is None:
        return plain
    return adapter.apply(plain, head_was_tied=config.tied_embeddings and not config.is_bare)


def check_checkpoint(
    checkpoint: Checkpoint, config: ModelConfig, format: WeightFormat | None = None, adapter: Adapter | None = None
) -> tuple[str, ...]:
    """Check the headers against the whole model, so that every rank of every stage finds the same errors. Allocates nothing.

    If config.json ties the head to the embedding, a stored `lm_head.weight` is ignored whatever it holds, as in transformers. Returns such
    names.

    Raises:
        CheckpointMismatch: tensors are missing, superfluous or misshapen, or in an unquantised model of an integer dtype.
        CheckpointError: a quantised matrix lacks a part, or its parts do not fit each other.
        AdapterError: the adapter is of another model.
    """
    dtype, device = DTYPES[config.dtype], torch.device("cpu")
    adapted = _adapted(config, adapter)
    whole = _make(adapted, single_rank_groups(), device=device, dtype=dtype, block_tokens=1, backend="reference", format=format)
    plain = format is None or set(format.specs()) == {"weight"}
    wanted = {binding.name: binding.slot.shape for binding in whole.bindings()}
    tensors = _tensors(checkpoint, config, adapter, wanted)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    ignored = {f"{HEAD}.weight"} & found.keys() if whole.config.tied_embeddings else set()
    missing, unused = wanted.keys() - found.keys(), found.keys() - wanted.keys() - ignored
    misshapen = [(name, found[name], shape) for name, shape in wanted.items() if name in found and found[name] != shape]
    mistyped = [name for name in wanted.keys() & found.keys() if plain and tensors[name].dtype not in DTYPES.values()]
    if missing or unused or misshapen or mistyped:
        raise CheckpointMismatch(missing=missing, unused=unused, misshapen=misshapen, mistyped=mistyped, location=str(checkpoint.location))
    return tuple(ignored)
