"""Steps that no client asked for: they check the rank, do the one-time work of first steps, and measure."""

import logging
from collections.abc import Callable

from engine.config import EngineConfig
from engine.errors import InvalidLogits
from engine.plan import NewSequence, StepPlan, Work
from engine.request import SamplingParams
from engine.run.cuda_graphs import GraphRecorder
from engine.run.decode_graphs import capture_obstacle
from engine.run.prompt_graphs import prompt_obstacle
from engine.run.runner import Runner
from parallel.quantised_format import has_triton

logger = logging.getLogger(__name__)

FIRST_SEQUENCE = -1
"""Sequences of real requests count up from 0, these count down."""


def full_step(
    *, max_step_tokens: int, max_running: int, num_blocks: int, block_tokens: int, num_shards: int = 1, num_next_draft: int = 0
) -> StepPlan:
    """The heaviest possible step: on every shard the most tokens of a step, in as many sequences as can run, each sampling and, with a
    draft model, each asking for ``num_next_draft`` tokens.

    All sequences of a shard use the same first blocks. What they leave in the cache is meaningless, but no sequence survives.
    """
    num_sequences = min(max_running, max_step_tokens)
    tokens = max(1, min(max_step_tokens // num_sequences, num_blocks * block_tokens - num_next_draft))
    blocks = tuple(range(-(-(tokens + num_next_draft) // block_tokens)))
    sampling = SamplingParams(top_p=0.9, repetition_penalty=1.1)  # no other parameters need more memory
    sequences = [(FIRST_SEQUENCE - i, i % num_shards) for i in range(num_sequences * num_shards)]
    return StepPlan(
        step=0,
        other_works=tuple(
            Work(sequence, 0, (0,) * tokens, blocks, samples=True, num_next_draft=num_next_draft, shard=shard)
            for sequence, shard in sequences
        ),
        opened=tuple(NewSequence(sequence, 0, tokens, sampling, (0,) * tokens, shard=shard) for sequence, shard in sequences),
    )


def warm_up(runner: Runner) -> None:
    """Run the kinds of steps that every request has: a short prompt, a few tokens, and one token. Each rank runs its own shard's.

    Raises:
        InvalidLogits: the model computes NaN or infinity, so its weights are broken.
    """
    prompt = (0,) * max(1, min(16, runner.capacity.max_context_tokens - 1))
    blocks = tuple(range(-(-(len(prompt) + 1) // runner.capacity.block_tokens)))
    blocks = blocks[: runner.capacity.num_blocks]
    opening = NewSequence(FIRST_SEQUENCE, 0, len(prompt), SamplingParams(top_k=20), shard=runner.shard)
    for tokens in (prompt, prompt[:2], prompt[:1]):
        work = Work(FIRST_SEQUENCE, 0, tokens, blocks, samples=True, shard=runner.shard)
        run_once(runner, StepPlan(0, (work,), (opening,)))


def tune(runner: Runner, engine_config: EngineConfig) -> None:
    """Let the kernels measure their best tile sizes for few and for many rows, unless they are known for this device."""
    if not has_triton():
        return
    from parallel.cuda.autotune import AUTOTUNED_ROWS, autotuner_for, launch_seconds
    from parallel.cuda.gemv import GEMV_ROWS  # imports triton, which exists only where there is a CUDA device

    max_tokens, most_running = engine_config.max_step_tokens, engine_config.max_running
    tiles = autotuner_for(runner.device)
    with tiles.measuring(launch_seconds):
        up_to = sorted({max_tokens, *(min(most, max_tokens) for most in AUTOTUNED_ROWS)})
        for tokens in (*up_to, *GEMV_ROWS):  # the fewest last: products of up to 16 rows are to be measured with 16
            run_once(
                runner,
                full_step(
                    max_step_tokens=tokens,
                    max_running=min(tokens, most_running),
                    num_blocks=runner.capacity.num_blocks,
                    block_tokens=runner.capacity.block_tokens,
                    num_shards=runner.model.groups.topology.dp,
                ),
            )
    logger.info("tile sizes as measured: %s", tiles)


def capture(
    runner: Runner,
    graphs: GraphRecorder,
    engine_config: EngineConfig,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    *,
    prompts: bool = False,
    prompts_ahead: bool = False,
) -> None:
    """Capture CUDA graphs of decode-only steps, and with ``prompts`` of other steps, where the model allows it; else log why not.

    Then warm up once more. ``prompts_ahead``: see `RunnerConfig`.
    """
    if (obstacle := capture_obstacle(runner.model, engine_config)) is not None:
        logger.info("steps are launched, not replayed from CUDA graphs: %s", obstacle)
        return
    if prompts and (obstacle := prompt_obstacle(runner.model)) is not None:
        logger.info("steps with prompts are launched, not replayed: %s", obstacle)
    runner.capture(
        graphs,
        max_rows=min(engine_config.max_running, engine_config.max_step_tokens),
        edits=engine_config.speculate is None,  # draft tokens would have to be counted before they are verified
        max_prompt_tokens=engine_config.max_step_tokens if prompts and obstacle is None else 0,
        prompts_ahead=prompts_ahead,
        on_progress=on_progress,
    )
    warm_up(runner)


def run_once(runner: Runner, plan: StepPlan) -> None:
    """Run a plan that opens all its sequences, then close them."""
    result = runner.run(plan)
    runner.run(StepPlan(plan.step, (), closed=tuple(opening.sequence for opening in plan.opened)))
    for sampled in result.sampled if result else ():
        if sampled.fault:
            raise InvalidLogits(f"in a warm-up step, {sampled.fault}: the weights are broken, or overflow in this dtype")
