"""Hidden states of a step that is not replayed as a whole. Place 10 of a request.

T tokens in the batch, R rows with logits, D model width.
"""

from torch import Tensor

from engine.run.prompt_graphs import PromptGraphs
from model.batch import ForwardBatch
from model.kv_cache import KvCache
from model.qwen2 import Qwen2


class Forward:
    """One rank's model with its KV cache."""

    def __init__(self, model: Qwen2, cache: KvCache) -> None:
        self.model, self.cache = model, cache
        self.prompt_graphs: PromptGraphs | None = None
        """If set, the steps that it accepts are replayed piecewise; all others are launched."""

    def hidden(self, batch: ForwardBatch, kept_R: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The hidden states that `Qwen2.hidden` computes with ``kept_R``, and the tokens that they belong to (None: all).

        A piecewise replay computes them for all tokens (T, D).
        """
        if self.prompt_graphs is not None and self.prompt_graphs.accepts(batch.num_tokens):
            return self.prompt_graphs.hidden(batch), None
        return self.model.hidden(batch, self.cache, kept_R), kept_R
