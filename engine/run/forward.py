"""Step 10 of a request, where a step is not replayed as a whole: hidden states of its tokens.

T tokens in the batch, R rows with logits, D model width.
"""

from torch import Tensor

from engine.run.prompt_graphs import PromptGraphs
from model.batch import ForwardBatch
from model.kv_cache import KvCache
from model.qwen2 import Qwen2


class Forward:
    """One rank's model over its cache."""

    def __init__(self, model: Qwen2, cache: KvCache) -> None:
        self.model, self.cache = model, cache
        self.prompt_graphs: PromptGraphs | None = None
        """Where it is not None, steps that it takes are replayed in pieces; all others are launched."""

    def hidden(self, batch: ForwardBatch, kept_R: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What `Qwen2.hidden` gives with ``kept_R``; in pieces, of all tokens (T, D). And of which tokens that is, None of all."""
        if self.prompt_graphs is not None and self.prompt_graphs.accepts(batch.num_tokens):
            return self.prompt_graphs.hidden(batch), None
        return self.model.hidden(batch, self.cache, kept_R), kept_R
