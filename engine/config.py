"""Settings of the engine."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Scheduling: limits of a step and of a replica."""

    block_tokens: int = 16
    """Tokens per KV block."""
    max_step_tokens: int = 2048
    """Maximum tokens computed per step on each data-parallel shard. Longer prompts are split into chunks (chunked prefill)."""
    prompt_share: float = 0.5
    """Share of a step's time for prompts while sequences decode; it grows when many prompts wait (`prompt_wait_steps`). Prompts are split
    accordingly, by measured step times. With 0.5, a running stream waits about twice as long for its next token as without prompts. 1 =
    prompts are limited by `max_step_tokens` only."""
    prompt_wait_steps: float = 10.0
    """If the waiting prompts would take longer at `prompt_share` than this many steps without prompts, their share grows: to two thirds,
    and to nine tenths while a step takes no longer than `prompt_step_s`."""
    prompt_step_s: float = 0.4
    """Approximate limit of a step's duration for prompt shares above two thirds. Steps on GPUs are shorter anyway; on a CPU it keeps
    streams from pausing for most of a second."""
    max_step_s: float | None = None
    """Approximate limit of a step's duration while sequences decode; prompts are split accordingly, by measured step times. It bounds how
    long a running stream waits for its next token. None = no limit."""
    max_running: int = 256
    """Maximum running sequences (those that hold KV blocks), over all shards."""
    max_waiting: int = 1024
    """Maximum waiting requests; further requests are rejected with `QueueFull`."""
    max_in_flight: int = 1
    """Steps submitted before the result of the first is read; at least the number of pipeline stages, whatever is set. With more than
    that, a sequence that waits for a result is left out of the steps submitted meanwhile."""
    run_ahead: bool = True
    """Asynchronous scheduling: plan the next step before the current step's tokens are known, if the ranks keep the sampled tokens
    themselves (on GPUs, without pipeline stages) and all decoding sequences are in the step. The device then never waits for a plan.
    Answers do not change."""
    speculate: Literal["lookup", "draft"] | None = None
    """Speculative decoding: draft the next tokens of a sequence and verify several in one step, where that is faster. "lookup": the draft
    is what followed the last few tokens earlier in the prompt or answer (n-gram prompt lookup). "draft": it comes from a small model with
    the same vocabulary (`runner.draft_model`). Answers do not change. None = one token per step."""
    max_draft_tokens: int = 8
    """Maximum draft tokens per sequence and step (elsewhere: num_speculative_tokens). The actual number adapts to the acceptance rate and
    the cost of steps."""
    prefix_cache: bool = True
    """Prefix caching: keep finished KV blocks by content, so that an equal prefix is not computed again."""
    rebalance_every_steps: int | None = None
    """Expert load balancing: check every so many steps whether the ranks that share routed experts are equally loaded. None = only on
    request: moved experts are summed in another order, so the last bits of an answer would depend on when it was computed."""
    rebalance_threshold: float = 1.2
    """Ratio of the busiest rank's load to the mean above which a layer's experts are moved."""

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
