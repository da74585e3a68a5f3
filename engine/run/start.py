"""Starts a rank from a checkpoint: join the process groups, load the weights, measure memory, warm up, capture graphs."""

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

import torch

from engine.config import EngineConfig
from engine.load_stats import LoadStats
from engine.run.cuda_graphs import CudaGraphRecorder
from engine.run.draft_compatibility import check_draft_model
from engine.run.drafter import open_drafter
from engine.run.grammar.guides import Guides
from engine.run.grammar.lazy_compiler import open_guides
from engine.run.host_resources import multiplies_bfloat16, usable_cores
from engine.run.memory import measure_capacity
from engine.run.runner import Runner, sampling_ranks
from engine.run.sampling.sampler import Sampler
from engine.run.settings import RunnerConfig, draft_model_of
from engine.run.warm_up import capture, tune, warm_up
from model.adapter import Adapter
from model.adapter_files import files_with_adapter
from model.checkpoint import Checkpoint
from model.checkpoint_folder import small_files
from model.config import ModelConfig
from model.dtypes import DTYPES
from model.formats import Formats, choose_formats
from model.kv_cache import KvCache
from model.load import load_model
from model.quantised_tensor import QuantisedTensor, dequantised_tensors
from model.qwen2 import Qwen2
from model.share_alignment import share_alignment
from parallel.common_kinds import common_kinds
from parallel.dispatch import choose_dispatch
from parallel.groups import ParallelGroups, Rendezvous, open_groups, single_rank_groups
from parallel.layout_check import check_layout
from parallel.native.library import native
from parallel.quantisation import FP8
from parallel.quantised_format import has_triton
from parallel.topology import Topology

logger = logging.getLogger(__name__)

StartPhase = Literal["groups", "weights", "memory", "warm_up", "capture"]


@dataclass(frozen=True, slots=True)
class StartProgress:
    """How far the start of a rank has come."""

    phase: StartPhase
    done: int
    total: int
    """For "weights" bytes of the checkpoint tensors that this rank needs a share of; for "capture" CUDA graphs; for other phases 1, with
    ``done`` 0 or 1."""
    read: LoadStats | None = None
    """Reported once, when the weights are loaded."""


OnProgress = Callable[[StartProgress], None]


@contextmanager
def start_rank(
    *,
    checkpoint_folder: Path | str,
    topology: Topology,
    rank: int,
    rendezvous: str | None,
    runner_config: RunnerConfig,
    engine_config: EngineConfig,
    adapter: Path | str | None = None,
    on_progress: OnProgress | None = None,
    ranks_on_host: int | None = None,
    replicas_on_host: int = 1,
) -> Iterator[Runner]:
    """One rank, ready to `run` plans. Its process groups are closed on exit.

    ``checkpoint_folder`` is a path or the URL of a remote folder (`model.checkpoint_folder`), and so is ``adapter``, which is merged into
    its weights. ``rendezvous`` is where the ranks find each other (``tcp://address:port``); a single rank needs none. ``ranks_on_host``
    ranks share this host's cores and memory (None = all of the topology), and ``replicas_on_host`` replicas with as many ranks each share
    its memory. Every rank of the topology must call this at the same time: they wait for each other.

    Raises:
        InvalidModelConfig, UnsupportedModel: from config.json.
        ContextTooLong: ``max_context_tokens`` in the settings exceeds the model's limit.
        CheckpointError, CheckpointMismatch: from the weight files.
        AdapterError: the adapter is of an unsupported kind, or of another model.
        InvalidLayout: the model does not fit this topology.
        NoRoomForKv: no KV block fits beside the weights.
        InvalidLogits: the model computes NaN or infinity.
        IncompatibleDraftModel: the draft model does not fit this model.
        ValueError: a setting does not fit this model, device or topology.
    """
    notify = on_progress or (lambda _progress: None)
    on_host = ranks_on_host or topology.size
    device = resolve_device(runner_config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device
    if device.type == "cpu":
        torch.set_num_threads(runner_config.num_threads or max(1, usable_cores() // on_host))
    with ExitStack() as stack:
        model_config = ModelConfig.from_checkpoint(small_files(checkpoint_folder))
        check_layout(topology, model_config)
        _check_tokens(model_config, runner_config)
        model_config.context_limit(runner_config.max_context_tokens)
        small = files_with_adapter(small_files(checkpoint_folder), None if adapter is None else small_files(adapter))
        with (  # before joining the groups, so that a damaged checkpoint is refused without waiting for other ranks
            Checkpoint(checkpoint_folder) as checkpoint,
            nullcontext() if adapter is None else Adapter(adapter) as opened_adapter,
        ):
            if (draft_folder := draft_model_of(engine_config, runner_config)) is not None:
                check_draft_model(checkpoint_folder, draft_folder)
            groups = stack.enter_context(_join_groups(topology, rank, rendezvous, runner_config, device, notify))
            stack.push(_clear_frames)
            model = _load(checkpoint, opened_adapter, model_config, groups, runner_config, engine_config, device, notify)
        sampler = _make_sampler(model, runner_config) if rank in sampling_ranks(topology) else None
        draft_model = _load_draft_model(draft_folder, model, runner_config, engine_config, device) if draft_folder and sampler else None
        runner = make_runner(
            model,
            sampler,
            runner_config=runner_config,
            engine_config=engine_config,
            ranks_sharing_memory=on_host * replicas_on_host,
            draft_model=draft_model,
            guides=open_guides(small, sampler.vocab_size, runner_config) if sampler else None,
            notify=notify,
        )
        stack.callback(runner.close)  # before the groups are closed
        yield runner


def _clear_frames(_kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
    """After an error in a step or a capture, the local variables in its traceback would keep graphs alive while the groups are closed;
    see `Runner.close`."""
    if error is not None:
        traceback.clear_frames(error.__traceback__)


def make_runner(
    model: Qwen2,
    sampler: Sampler | None,
    *,
    runner_config: RunnerConfig,
    engine_config: EngineConfig,
    ranks_sharing_memory: int = 1,
    draft_model: Qwen2 | None = None,
    guides: Guides | None = None,
    notify: OnProgress = lambda _progress: None,
) -> Runner:
    """A rank around a loaded model: memory measured, warmed up, steps captured. All ranks of the topology must call this at the same time.

    Raises:
        NoRoomForKv, InvalidLogits: see `start_rank`.
    """
    groups, device = model.groups, model.device
    _enable_kernel_options(runner_config, device)
    with _phase("memory", notify):
        capacity = measure_capacity(
            model,
            sampler,
            runner_config=runner_config,
            engine_config=engine_config,
            groups=groups,
            ranks_sharing_memory=ranks_sharing_memory,
            draft_model=draft_model,
        )
        cache = KvCache(model.kv_layout, capacity.num_blocks, device)
    runner = Runner(
        model=model,
        cache=cache,
        capacity=capacity,
        sampler=sampler,
        device=device,
        shard=groups.dp.rank,
        guides=guides,
        drafter=open_drafter(draft_model, sampler, capacity.num_blocks),
    )
    try:
        _make_ready(runner, runner_config, engine_config, notify)
    except BaseException:
        runner.close()
        raise
    runner.rebalancer.reset()
    # repr here, so that a kept log record does not keep the weights alive
    logger.info("rank %d of %d is ready: %s", groups.rank, groups.topology.size, repr(runner))
    return runner


def _make_ready(runner: Runner, runner_config: RunnerConfig, engine_config: EngineConfig, notify: OnProgress) -> None:
    on_device = runner.device.type == "cuda"
    with _phase("warm_up", notify):
        warm_up(runner)
        if runner_config.tune_tiles and runner_config.kv_cache_bytes is not None and on_device:
            tune(runner, engine_config)  # otherwise that was done before memory was measured
    if runner_config.cuda_graphs and on_device:
        capture(
            runner,
            CudaGraphRecorder(runner.device),
            engine_config,
            lambda done, total: notify(StartProgress("capture", done, total)),
            prompts=runner_config.prompt_graphs,
            prompts_ahead=runner_config.prompts_ahead,
        )


def _enable_kernel_options(runner_config: RunnerConfig, device: torch.device) -> None:
    """Applies to this process. Must precede any capture."""
    if device.type != "cuda" or not has_triton():
        return
    from parallel.cuda import dependent_launch, gated_gemv, quick_launch  # imports triton, which exists only where there is a CUDA device

    dependent_launch.enable(runner_config.early_launches)
    quick_launch.enable(runner_config.quick_launches)
    gated_gemv.enable(runner_config.gated_gemv)


def resolve_device(name: str) -> torch.device:
    """The device for a `RunnerConfig.device`, with its index."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype for a `RunnerConfig.dtype` on this device."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float16
    return torch.bfloat16 if native() is None and multiplies_bfloat16(device) else torch.float32  # our own CPU kernels compute in float32


def choose_weight_formats(
    checkpoint: Checkpoint,
    model_config: ModelConfig,
    config: RunnerConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    topology: Topology | None = None,
    kinds: frozenset[str] | None = None,
) -> Formats:
    """The formats in which the ranks of a topology (None: a single rank) hold this checkpoint's weights. Only its headers are read.

    Matrices that are stored quantised stay quantised by default. Embedding and head are not stored quantised, and are treated as those
    of any checkpoint.
    """
    choose = partial(choose_formats, device, dtype, rounds_activations=config.dtype == "auto", common_kinds=kinds)
    quantisation = model_config.quantisation
    stored = [tensor for tensor in dequantised_tensors(checkpoint.tensors, quantisation).values() if len(tensor.shape) == 2]
    formats = choose([tensor.dtype for tensor in stored if not isinstance(tensor, QuantisedTensor)], config.quantize)
    if quantisation is None:
        return formats
    kind = config.quantize or quantisation.preferred_kind(share_alignment(model_config, topology or Topology()))
    if kind == "int4_zeros" and any(tensor.name.endswith("_proj.weight") for tensor in stored if not isinstance(tensor, QuantisedTensor)):
        kind = "int8"  # the layers have matrices that are not stored quantised, and 4 bits would lose much of their precision
    logger.info("matrices are stored by %s in %d bits, and held in %s", quantisation.method.upper(), quantisation.bits, kind)
    return Formats(choose([QuantisedTensor.dtype], kind).matrices, formats.table)


@contextmanager
def _join_groups(
    topology: Topology, rank: int, rendezvous: str | None, config: RunnerConfig, device: torch.device, notify: OnProgress
) -> Iterator[ParallelGroups]:
    if topology.size == 1:
        yield single_rank_groups()
        return
    notify(StartProgress("groups", 0, 1))
    address = _parse_rendezvous(rendezvous)
    with open_groups(
        topology, rank, rendezvous=address, device=device, timeout_s=config.collective_timeout_s, symmetric=config.symmetric_memory
    ) as groups:
        notify(StartProgress("groups", 1, 1))
        yield groups


def _parse_rendezvous(text: str | None) -> Rendezvous:
    parts = urlsplit(text or "")
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise ValueError(f"several ranks need a rendezvous of the form tcp://address:port, got {text!r}")
    return Rendezvous(parts.hostname, parts.port)


def _load(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    model_config: ModelConfig,
    groups: ParallelGroups,
    config: RunnerConfig,
    engine_config: EngineConfig,
    device: torch.device,
    notify: OnProgress,
) -> Qwen2:
    reported = 0

    def report_bytes(done: int, total: int) -> None:
        nonlocal reported
        if done in (0, total) or done - reported >= total // 100:  # a large model has thousands of tensors
            reported = done
            notify(StartProgress("weights", done, total))

    dtype = resolve_dtype(config.dtype, device)
    # experts move between ranks, which must all have kernels for them
    kinds = common_kinds(groups.stage) if device.type == "cpu" and groups.ep.size > 1 else None
    formats = choose_weight_formats(checkpoint, model_config, config, dtype, device, topology=groups.topology, kinds=kinds)
    model, report = load_model(
        checkpoint,
        model_config,
        groups,
        device=device,
        dtype=dtype,
        block_tokens=engine_config.block_tokens,
        adapter=adapter,
        backend=config.attention_backend,
        dispatch=choose_dispatch(groups, device) if config.dispatch == "auto" else config.dispatch,
        redundant_experts=config.redundant_experts,
        format=formats.matrices,
        table_format=formats.table,
        kv_dtype=None if config.kv_dtype == "auto" else FP8,
        kv_may_be_bfloat16=formats.rounds_activations,
        on_progress=report_bytes,
    )
    logger.info(
        "rank %d read %d of %d bytes of weights in %.1f s (%d bytes fetched); computing in %s with %s on %s with %d threads",
        groups.rank, report.bytes_read, report.bytes_of_checkpoint, report.seconds, report.bytes_fetched,
        model.dtype, formats.matrices, device, torch.get_num_threads(),
    )  # fmt: skip
    if adapter is not None:
        logger.info("rank %d merged %r", groups.rank, adapter)
    read = LoadStats(kept_bytes=report.bytes_read, fetched_bytes=report.bytes_fetched, seconds=report.seconds)
    notify(StartProgress("weights", reported, reported, read))
    return model


def _load_draft_model(folder: str, model: Qwen2, config: RunnerConfig, engine_config: EngineConfig, device: torch.device) -> Qwen2:
    """Load the whole draft model on this rank."""
    with Checkpoint(folder) as checkpoint:
        model_config = ModelConfig.from_checkpoint(small_files(folder))
        formats = choose_weight_formats(checkpoint, model_config, config, model.dtype, device)
        draft_model, report = load_model(
            checkpoint,
            model_config,
            single_rank_groups(),
            device=device,
            dtype=model.dtype,
            block_tokens=engine_config.block_tokens,
            backend=config.attention_backend,
            format=formats.matrices,
            table_format=formats.table,
            kv_dtype=None if config.kv_dtype == "auto" else FP8,
            kv_may_be_bfloat16=formats.rounds_activations,
        )
    logger.info("the draft model of %d layers was read in %.1f s", draft_model.config.num_layers, report.seconds)
    return draft_model


def _check_tokens(model_config: ModelConfig, config: RunnerConfig) -> None:
    vocab_size, num_real_tokens = model_config.vocab_size, config.num_real_tokens
    if num_real_tokens is not None and num_real_tokens > vocab_size:
        raise ValueError(f"num_real_tokens={num_real_tokens} of a vocabulary of {vocab_size} rows: this tokenizer is of another model")


def _make_sampler(model: Qwen2, config: RunnerConfig) -> Sampler:
    return Sampler(vocab_size=config.num_real_tokens or model.config.vocab_size, device=model.device)


@contextmanager
def _phase(phase: StartPhase, notify: OnProgress) -> Iterator[None]:
    notify(StartProgress(phase, 0, 1))
    yield
    notify(StartProgress(phase, 1, 1))
