"""What the service must know of the model it speaks for, without holding its weights."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model.config import ModelConfig
from model.generation_config import GenerationDefaults
from model.pooling import PoolingConfig, PoolingKind
from serve.text.chat_template import stored_source
from serve.text.tokenizer import Tokenizer, read_settings


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One served model."""

    name: str
    """What clients call it."""
    folder: Path
    max_context_tokens: int
    """Prompt and answer together."""
    vocab_size: int
    """Rows of the embedding matrix."""
    num_real_tokens: int
    """Ids below this can be sampled; rows above are padding."""
    defaults: GenerationDefaults
    """Used where a client says nothing."""
    created: int
    """Unix time at which this server began to offer it."""
    base: str | None = None
    """The checkpoint's own name, whatever clients call it."""
    adapter: str | None = None
    """That of the adapter that is added to it; None: there is none."""
    width: int = 0
    """Numbers of an embedding."""
    pooling: PoolingConfig | None = None
    """How it makes embeddings; None: it gives none."""
    is_causal: bool = True
    answers: bool = True
    """Whether it goes on with texts. A model whose tokens all see each other, or that has no head, cannot."""
    tokenizer_info: Mapping[str, Any] = field(default_factory=dict)
    """Of tokenizer_config.json what tools want to know, with the chat template."""

    @property
    def root(self) -> str:
        """What it is made of by its own name, as vLLM tells it: the adapter if there is one, else the checkpoint."""
        return self.adapter or self.base or self.name

    @property
    def parent(self) -> str | None:
        """The checkpoint that the adapter is added to."""
        return self.base if self.adapter else None

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path,
        *,
        name: str,
        tokenizer: Tokenizer,
        max_context_tokens: int | None = None,
        pooling: PoolingKind | Literal["auto"] = "auto",
        base: str | None = None,
        adapter: str | None = None,
    ) -> "ModelFacts":
        """Read config.json and generation_config.json, and what there is of embeddings.

        ``max_context_tokens`` lowers the model's own limit. ``pooling`` makes any model one that gives embeddings,
        normalised; "auto" goes by its files. ``base`` and ``adapter`` are told to whoever asks for the models.

        Raises:
            InvalidModelConfig, UnsupportedModel: see `ModelConfig.from_checkpoint`.
            ContextTooLong: it would raise it.
            ValueError: the tokenizer has ids that the model has no rows for, so they do not belong together.
        """
        config = ModelConfig.from_checkpoint(folder)
        if tokenizer.num_real_tokens > config.vocab_size:
            raise ValueError(f"the tokenizer in {folder} knows {tokenizer.num_real_tokens} tokens, the model only {config.vocab_size}")
        return cls(
            name=name,
            folder=folder,
            max_context_tokens=config.context_limit(max_context_tokens),
            vocab_size=config.vocab_size,
            num_real_tokens=tokenizer.num_real_tokens,
            defaults=GenerationDefaults.from_checkpoint(folder, config),
            created=int(time.time()),
            base=base,
            adapter=adapter,
            width=config.hidden_size,
            pooling=PoolingConfig.from_checkpoint(folder) if pooling == "auto" else PoolingConfig(kind=pooling, normalise=True),
            is_causal=config.is_causal,
            answers=config.is_causal and not config.is_bare,
            tokenizer_info=_tokenizer_info(folder, tokenizer),
        )


def _tokenizer_info(folder: Path, tokenizer: Tokenizer) -> Mapping[str, Any]:
    settings = read_settings(folder)
    told = {name: settings[name] for name in ("tokenizer_class", "model_max_length", "add_prefix_space") if name in settings}
    return told | tokenizer.named | {"chat_template": stored_source(folder)}
