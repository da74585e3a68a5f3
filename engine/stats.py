"""A snapshot of the engine's gauges and counters."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Gauges as of now, and counters since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    prefill_tokens: int = 0
    """Known tokens still to be computed, of waiting sequences and of prompts that have been started."""
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_free: int = 0

    num_steps: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_losses: int = 0
    """How often the workers were lost."""
    computed_tokens: int = 0
    """Tokens that steps computed, including those computed again."""
    sampled_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    drafted_tokens: int = 0
    """Draft tokens that steps computed, ..."""
    accepted_tokens: int = 0
    """... and those of them that were accepted."""
    expert_moves: int = 0
    """Copies of routed experts that were moved between ranks."""
    expert_imbalance: float = 1.0
    """After the last rebalance: the busiest rank's load over the mean, in the worst layer."""
    step_base_s: float = 0.0
    step_token_s: float = 0.0
    """The estimated cost of a step and of each token in it; see `engine.step_cost`."""
    step_s: float = 0.0
    """Seconds of a step on the slowest sampling rank, smoothed over about 20 steps."""

    @property
    def kv_used(self) -> float:
        """Fraction of the KV blocks that running sequences hold."""
        total = self.blocks_used + self.blocks_cached + self.blocks_free
        return self.blocks_used / total if total else 0.0
