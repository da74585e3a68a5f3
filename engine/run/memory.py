"""How many KV blocks a rank can hold beside its weights, and how many every rank can hold."""

import logging
from contextlib import closing

import torch

from engine.config import EngineConfig
from engine.errors import EngineError
from engine.executor import Capacity
from engine.run.cuda_graphs import CudaGraphRecorder
from engine.run.drafter import open_drafter
from engine.run.host_resources import available_memory_bytes
from engine.run.runner import Runner
from engine.run.sampling.sampler import Sampler
from engine.run.settings import RunnerConfig
from engine.run.warm_up import capture, full_step, run_once, tune
from model.kv_cache import KvCache
from model.qwen2 import Qwen2
from parallel.collectives import all_gather, barrier
from parallel.groups import ParallelGroups

logger = logging.getLogger(__name__)

CPU_FRACTION = 0.3
CPU_MAX_BYTES = 4 << 30
"""Default limit of the memory for KV of all ranks on a host, of all replicas together: a prefix cache eventually fills what it gets."""
CUDA_FRACTION = 0.9
"""Default part of a GPU's memory that may be used, by weights, KV cache and steps together."""


class NoRoomForKv(EngineError):
    """A rank cannot hold a single KV block beside its weights."""

    def __init__(self, *, budget_bytes: int, bytes_per_block: int) -> None:
        super().__init__(
            f"a KV block needs {bytes_per_block} bytes on a rank and {max(budget_bytes, 0)} are free for KV; "
            "raise kv_cache_bytes or kv_memory_fraction, or use more ranks"
        )
        self.budget_bytes, self.bytes_per_block = budget_bytes, bytes_per_block


def measure_capacity(
    model: Qwen2,
    sampler: Sampler | None,
    *,
    runner_config: RunnerConfig,
    engine_config: EngineConfig,
    groups: ParallelGroups,
    ranks_sharing_memory: int,
    draft_model: Qwen2 | None = None,
) -> Capacity:
    """The capacity of the rank that has the least. All ranks must call this at the same time.

    ``ranks_sharing_memory``: ranks on this host, those of other replicas included. A CPU allocates memory for KV only when it is used, so
    what is promised to one rank still looks free to the next.

    With a ``draft_model`` a block on this rank is one of the model's KV and one of the draft model's.

    Raises:
        NoRoomForKv: some rank cannot hold one block.
    """
    layout = model.kv_layout
    bytes_per_block = layout.bytes_per_block + (draft_model.kv_layout.bytes_per_block if draft_model else 0)
    budget_bytes = runner_config.kv_cache_bytes
    if budget_bytes is None:
        barrier(groups.world)  # by now all ranks of this host have loaded their weights, and none has allocated KV
        fraction = runner_config.kv_memory_fraction
        if model.device.type == "cuda":
            most_bytes = int(torch.cuda.mem_get_info(model.device)[1] * (fraction or CUDA_FRACTION))
            budget_bytes = most_bytes - _cuda_bytes_beside_kv(model, sampler, runner_config, engine_config, groups, draft_model)
        else:
            budget_bytes = _cpu_budget(fraction) // ranks_sharing_memory
    mine = torch.tensor([budget_bytes // bytes_per_block, budget_bytes, bytes_per_block], device=model.device)
    num_blocks, least_bytes, block_bytes = min(all_gather(mine.unsqueeze(0), groups.world, dim=0).tolist())
    if num_blocks < 1:
        raise NoRoomForKv(budget_bytes=least_bytes, bytes_per_block=block_bytes)
    limit = model.config.context_limit(runner_config.max_context_tokens)
    # as many as all sequences at full length need
    num_blocks = min(num_blocks, engine_config.max_running * -(-limit // layout.block_tokens))
    logger.info("%d KV blocks of %d tokens: %.2f GiB on this rank", num_blocks, layout.block_tokens, num_blocks * bytes_per_block / 2**30)
    return Capacity(
        num_blocks=num_blocks,
        block_tokens=layout.block_tokens,
        max_context_tokens=min(limit, num_blocks * layout.block_tokens),
        num_shards=groups.topology.dp,
        num_stages=groups.topology.pp,
        runs_ahead=_run_ahead(model, engine_config),
    )


def _run_ahead(model: Qwen2, engine_config: EngineConfig) -> bool:
    """Whether steps run ahead.

    All ranks agree, because those of a tp group then broadcast tokens. With several stages steps overlap anyway.
    """
    wanted = engine_config.run_ahead and engine_config.speculate is None
    return wanted and model.device.type == "cuda" and model.groups.pp.size == 1


def _cpu_budget(fraction: float | None) -> int:
    available = available_memory_bytes()
    return int(available * fraction) if fraction else min(int(available * CPU_FRACTION), CPU_MAX_BYTES)


def _cuda_bytes_beside_kv(
    model: Qwen2,
    sampler: Sampler | None,
    runner_config: RunnerConfig,
    engine_config: EngineConfig,
    groups: ParallelGroups,
    draft_model: Qwen2 | None,
) -> int:
    """Bytes of the device for everything but KV: weights and other processes, the heaviest step, and captured steps."""
    layout, device = model.kv_layout, model.device
    num_blocks = -(-engine_config.max_step_tokens // layout.block_tokens)
    cache = KvCache(layout, num_blocks, device)
    capacity = Capacity(
        num_blocks=num_blocks,
        block_tokens=layout.block_tokens,
        max_context_tokens=model.config.context_limit(runner_config.max_context_tokens),
        runs_ahead=_run_ahead(model, engine_config),
    )
    drafter = open_drafter(draft_model, sampler, num_blocks)
    runner = Runner(model=model, cache=cache, capacity=capacity, sampler=sampler, device=device, shard=groups.dp.rank, drafter=drafter)
    with closing(runner):
        if runner_config.tune_tiles:
            tune(runner, engine_config)
        step_bytes = _bytes_of_heaviest_step(runner, engine_config, groups)
        graph_bytes = _bytes_of_graphs(runner, engine_config, runner_config.prompt_graphs) if runner_config.cuda_graphs else 0
    del runner, cache, drafter
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    logger.info("besides the KV cache a step needs %.2f GiB and captured steps %.2f GiB", step_bytes / 2**30, graph_bytes / 2**30)
    return total - free + step_bytes + graph_bytes


def _bytes_of_heaviest_step(runner: Runner, engine_config: EngineConfig, groups: ParallelGroups) -> int:
    device = runner.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step = full_step(
        max_step_tokens=engine_config.max_step_tokens,
        max_running=engine_config.max_running,
        num_blocks=runner.capacity.num_blocks,
        block_tokens=runner.capacity.block_tokens,
        num_shards=groups.topology.dp,
        num_next_draft=int(engine_config.speculate == "draft"),
    )
    for _ in range(min(groups.topology.pp, 2)):  # with several stages the previous step's hidden states may still be in transit
        run_once(runner, step)
    torch.cuda.synchronize(device)
    hidden_states = engine_config.max_step_tokens * runner.model.config.hidden_size * runner.model.dtype.itemsize
    return torch.cuda.max_memory_allocated(device) - before + hidden_states  # of all tokens, which a prompt that is scored or pooled needs


def _bytes_of_graphs(runner: Runner, engine_config: EngineConfig, prompts: bool) -> int:
    """Measured by capturing them once: torch's memory and the driver's own. They are captured again once the KV cache is allocated."""
    device = runner.device
    torch.cuda.empty_cache()
    free_before, _ = torch.cuda.mem_get_info(device)
    capture(runner, CudaGraphRecorder(device), engine_config, prompts=prompts)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free_after, _ = torch.cuda.mem_get_info(device)
    return max(0, free_before - free_after)
