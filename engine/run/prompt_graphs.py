"""Piecewise CUDA graphs for steps with prompts: what treats each token by itself is replayed, attention is launched in between.

Only attention depends on a step's sequences and their lengths, so the pieces for some number of tokens suit every step with no more.
`RunnerConfig.prompt_graphs`: off because it has not been measured on a device yet. It is used by one line in
`engine.run.runner.Runner.capture` and one in `engine.run.forward`.

T tokens of a step, D model width, H query heads, K head width.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.run.cuda_graphs import GraphRecorder, Piece
from model.attention.backend import Attend, GraphBreak
from model.batch import ForwardBatch
from model.kv_cache import KvCache
from model.qwen2 import Qwen2

SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of tokens that are captured. A step is padded to the next one, because a product of many rows may take longer than one of few.
Beyond the last, the device should be busier than the host (not measured yet)."""
TOKENS, POSITIONS, SLOTS = range(3)
NO_SLOT = -1
"""The slot of a padding token."""


class PromptGraphs:
    """One rank's `CapturedGraphs`. Padding is token 0 at position 0, or left from an earlier step, and is written nowhere."""

    def __init__(
        self, model: Qwen2, cache: KvCache, graphs: GraphRecorder, *, max_tokens: int = SIZES[-1], sizes: Sequence[int] = SIZES
    ) -> None:
        """`prompt_obstacle` must be None. ``max_tokens``: the most tokens of any step."""
        self._model, self._cache, self._graphs = model, cache, graphs
        self.sizes = capture_sizes(max_tokens, sizes)
        most, device, heads = self.sizes[-1], model.device, model.attention_config
        self._numbers = torch.zeros(3, most, dtype=torch.int64, device=device)
        self._q_THK = torch.zeros(most, heads.num_heads, heads.head_dim, dtype=model.dtype, device=device)
        self._out_THK = torch.zeros_like(self._q_THK)
        self._hidden_TD = torch.zeros(most, model.config.hidden_size, dtype=model.dtype, device=device)
        """With the two above: buffers, shared by all sizes, for tensors that pass between a replayed piece and what is launched."""
        self._pieces: dict[int, list[Piece[Attend]]] = {}

    def __repr__(self) -> str:
        return f"<PromptGraphs [{len(self._pieces)} of {len(self.sizes)} captured | up to {self.sizes[-1]} tokens]>"

    @property
    def num_graphs(self) -> int:
        return len(self.sizes)

    @torch.inference_mode()
    def capture(self, after_each: Callable[[], None] = lambda: None) -> None:
        self._pieces.clear()
        self._numbers.zero_()
        self._numbers[SLOTS] = NO_SLOT
        for size in reversed(self.sizes):
            self._pieces[size] = self._graphs.capture_piecewise(partial(self._compute, size))
            after_each()

    def release(self) -> None:
        self._pieces.clear()

    def accepts(self, num_tokens: int) -> bool:
        """Whether a step of so many tokens is replayed. All ranks that compute this shard agree."""
        return 0 < num_tokens <= self.sizes[-1]

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """Like `Qwen2.hidden`, of all tokens (T, D). Valid until the next step."""
        count = batch.num_tokens
        size = next(size for size in self.sizes if size >= count)
        for row, given in ((TOKENS, batch.tokens_T), (POSITIONS, batch.positions_T), (SLOTS, batch.slots_T)):
            self._numbers[row, :count].copy_(given)
        if size > count:
            self._numbers[SLOTS, count:size] = NO_SLOT
        self._model.backend.prepare(batch)
        for replay, attend in self._pieces[size]:
            replay()
            if attend is not None:
                attend(batch)
        return self._hidden_TD[:count]

    def _compute(self, size: int, cut: Callable[[Attend], None]) -> None:
        backend = self._model.backend
        backend.graph_break = GraphBreak(self._q_THK[:size], self._out_THK[:size], cut)
        try:
            hidden_TD = self._model.hidden(self._batch(size), self._cache)
        finally:
            backend.graph_break = None
        assert hidden_TD is not None  # there is only one stage
        self._hidden_TD[:size].copy_(hidden_TD)

    def _batch(self, size: int) -> ForwardBatch:
        """A batch with only the fields that are read outside attention."""
        nothing = self._numbers[0, :0].int()
        return ForwardBatch(
            tokens_T=self._numbers[TOKENS, :size],
            positions_T=self._numbers[POSITIONS, :size],
            slots_T=self._numbers[SLOTS, :size],
            block_tables_SM=nothing.view(0, 1),
            lengths_S=nothing,
            query_starts=(0, size),
            context_lengths=(),
            num_decodes=0,
            logit_rows_R=self._numbers[0, :0],
        )


def capture_sizes(max_tokens: int, sizes: Sequence[int] = SIZES) -> tuple[int, ...]:
    """The last size fits a step of ``max_tokens``, if any does."""
    below = tuple(size for size in sizes if size < max_tokens)
    return below if len(below) == len(sizes) else (*below, max_tokens)


def prompt_obstacle(model: Qwen2) -> str | None:
    """Why steps of a model that can be captured cannot be captured piecewise; None if they can. The same on all ranks."""
    if not model.backend.supports_graph_breaks:
        return f"attention by {type(model.backend).__name__} cannot be split out of a captured step"
    if model.config.moe is not None and model.groups.ep.size > 1:
        return "padding would count as load of the experts"
    return None
