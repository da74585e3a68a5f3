"""Settings of the engine."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much a step and a replica may hold."""

    block_tokens: int = 16
    """Tokens per KV block."""
    max_step_tokens: int = 2048
    """Tokens computed in one step at most, on each data-parallel shard; longer prompts are cut into several works (chunked prefill)."""
    prompt_share: float = 0.5
    """While sequences decode, prompts are cut so that they take at least this part of a step's time, by what steps have taken so far: with
    0.5 a running stream waits about twice as long for its next token as without them. 1 = only `max_step_tokens` says how a prompt is
    cut."""
    prompt_wait_steps: float = 15.0
    """Where so many prompts wait that at `prompt_share` they would take longer than so many steps without prompts, their share grows, up to
    two thirds, and up to nine tenths while a step takes no longer than `prompt_step_s`."""
    prompt_step_s: float = 0.4
    """About so long a step may take by what waits, beyond two thirds for prompts: on GPUs steps stay below it, on a CPU streams would
    stand still for most of a second."""
    max_step_s: float | None = None
    """While sequences decode, prompts are cut so that a step takes about no longer than this whatever waits, by what steps have taken so
    far: the most that a running stream waits for its next token. None = no such limit."""
    max_running: int = 256
    """Sequences that hold KV blocks at the same time at most, on all shards together."""
    max_waiting: int = 1024
    """Requests that may wait; one more is refused with `QueueFull`."""
    max_in_flight: int = 1
    """Steps submitted before the first of them is answered. Never fewer than pipeline stages, whatever is set here. With more than there
    are stages, who waits for an answer misses the steps that leave before it."""
    run_ahead: bool = True
    """Plan one step more before the first is answered, where the ranks know themselves what they sampled (on GPUs, without stages) and
    everybody who decodes is in it. The device then waits for no plan. No answer changes by it."""
    speculate: Literal["lookup", "draft"] | None = None
    """Speculative decoding: guess the next tokens of a sequence and compute several in one step, where that is faster. "lookup": what
    followed when the last few tokens stood in prompt or answer before (n-gram, prompt lookup). "draft": what a small model of the same
    vocabulary says (`runner.draft_model`). No answer changes by it. None = one token per step."""
    max_draft_tokens: int = 8
    """Tokens guessed for a sequence in one step at most (elsewhere: num_speculative_tokens); how many it is, is learnt from how often
    they hold and what steps cost."""
    prefix_cache: bool = True
    """Keep finished blocks by content, so that an equal prefix is not computed again."""
    rebalance_every_steps: int | None = None
    """Look so often whether the ranks that share routed experts have equally much to do. None = only when asked: experts on other
    ranks are summed in another order, so the last bits of an answer then depend on when it was asked for."""
    rebalance_threshold: float = 1.2
    """The busiest rank's load over the mean above which a layer's experts change places."""

    def __post_init__(self) -> None:
        for name in ("block_tokens", "max_step_tokens", "max_running", "max_waiting", "max_in_flight", "max_draft_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rebalance_every_steps is not None and self.rebalance_every_steps < 1:
            raise ValueError(f"rebalance_every_steps must be at least 1, got {self.rebalance_every_steps}")
        if not 0 < self.prompt_share <= 1:
            raise ValueError(f"prompt_share must be above 0 and at most 1, got {self.prompt_share}")
        if not self.prompt_wait_steps > 0:
            raise ValueError(f"prompt_wait_steps must be above 0, got {self.prompt_wait_steps}")
        if not self.prompt_step_s > 0:
            raise ValueError(f"prompt_step_s must be above 0, got {self.prompt_step_s}")
        if self.max_step_s is not None and not self.max_step_s > 0:
            raise ValueError(f"max_step_s must be above 0, got {self.max_step_s}")
        if not self.rebalance_threshold >= 1:
            raise ValueError(f"rebalance_threshold must be at least 1, got {self.rebalance_threshold}")
