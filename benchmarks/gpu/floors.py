"""Lower bounds ("floors") for the time of a step or workload, from what it must read and multiply (shared/performance.md, section 1).

b rows of a step, L layers, D model width, V vocabulary.
"""

from collections.abc import Sequence

from benchmarks.gpu.ceilings import Ceilings
from model.config import ModelConfig


class Floors:
    """The floors of one model on one device."""

    def __init__(self, config: ModelConfig, ceilings: Ceilings, *, weight_bytes: float, kv_element_bytes: int, rate: float) -> None:
        """``weight_bytes``: bytes per weight in the layers; head and activations have 2. ``rate``: FLOP/s of the layers' products."""
        self._config, self._ceilings, self._weight_bytes, self._rate = config, ceilings, weight_bytes, rate
        width, head = config.hidden_size, config.head_dim
        attention = width * head * (2 * config.num_heads + 2 * config.num_kv_heads)
        dense, self._expert = 3 * width * config.intermediate_size, 0.0
        if config.moe is not None:
            dense = 3 * width * config.moe.shared_intermediate_size + width * (config.moe.num_experts + 1)
            self._expert = 3.0 * width * config.moe.expert_intermediate_size
        self._dense = config.num_layers * (attention + dense)
        self._head = config.vocab_size * width
        self.kv_bytes_per_token = 2 * config.num_layers * config.num_kv_heads * head * kv_element_bytes

    def weights_read(self, rows: int) -> float:
        """Weight bytes that a step of ``rows`` rows reads, with random routing to experts."""
        moe, experts = self._config.moe, 0.0
        if moe is not None:
            distinct = moe.num_experts * (1 - (1 - moe.experts_per_token / moe.num_experts) ** rows)
            experts = self._config.num_layers * distinct * self._expert
        return self._weight_bytes * (self._dense + experts) + 2.0 * self._head

    def flop_per_token(self) -> float:
        """FLOPs per token, without attention and head."""
        moe = self._config.moe
        chosen = 0.0 if moe is None else self._config.num_layers * moe.experts_per_token * self._expert
        return 2.0 * (self._dense + chosen)

    def decode_s(self, context_tokens: Sequence[int]) -> float:
        """A step that decodes one token after each of these contexts."""
        rows = len(context_tokens)
        read = self.weights_read(rows) + sum(context_tokens) * self.kv_bytes_per_token
        return max(read / self._ceilings.read_bytes_per_s, rows * (self.flop_per_token() + 2.0 * self._head) / self._rate)

    def prefill_s(self, tokens: int) -> float:
        """Prefill of one prompt alone; attention at the rate of matrix products."""
        attention = 2.0 * self._config.num_layers * self._config.num_heads * self._config.head_dim * tokens**2
        return max((self.flop_per_token() * tokens + attention) / self._rate, self.weights_read(tokens) / self._ceilings.read_bytes_per_s)

    def closed_loop_s(self, requests: Sequence[tuple[int, int]]) -> float:
        """All of these requests (tokens in, tokens out) at once: their prompts, then decode steps with a row per unfinished request."""
        most = max(out for _, out in requests)
        steps = 0.0
        for done in range(0, most, STRIDE):
            contexts = [tokens_in + done for tokens_in, out in requests if out > done]
            steps += self.decode_s(contexts) * min(STRIDE, most - done)
        return sum(self.prefill_s(tokens_in) for tokens_in, _ in requests) + steps


STRIDE = 16
"""Number of decode steps that are computed as one, for speed."""
