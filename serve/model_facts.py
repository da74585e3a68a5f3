"""Facts about a served model that the service needs; no weights."""

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
    """Model name that clients use."""
    folder: Path
    max_context_tokens: int
    """Limit for prompt plus answer."""
    vocab_size: int
    """Rows of the embedding matrix."""
    num_real_tokens: int
    """Ids below this can be sampled; further rows of the vocabulary are padding."""
    defaults: GenerationDefaults
    """Sampling defaults for parameters that a request omits."""
    created: int
    """Unix time at which this server started to offer the model."""
    base: str | None = None
    """The checkpoint's own name, independent of ``name``."""
    adapter: str | None = None
    """The LoRA adapter's own name; None: no adapter."""
    width: int = 0
    """Dimension of embeddings."""
    pooling: PoolingConfig | None = None
    """How embeddings are pooled; None: the model gives no embeddings."""
    is_causal: bool = True
    answers: bool = True
    """Whether it can generate text. A model with bidirectional attention, or without a head, cannot."""
    tokenizer_info: Mapping[str, Any] = field(default_factory=dict)
    """The fields of tokenizer_config.json that clients ask for, and the chat template."""

    @property
    def root(self) -> str:
        """The field ``root`` as in vLLM: the adapter's own name if there is one, else the checkpoint's."""
        return self.adapter or self.base or self.name

    @property
    def parent(self) -> str | None:
        """The checkpoint that the adapter is merged into; None without adapter."""
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
        """Read config.json, generation_config.json and the files about embeddings.

        ``max_context_tokens`` lowers the model's own limit. With ``pooling`` any model gives normalised embeddings; "auto" follows its
        files. ``base`` and ``adapter`` appear in the list of models.

        Raises:
            InvalidModelConfig, UnsupportedModel: see `ModelConfig.from_checkpoint`.
            ContextTooLong: ``max_context_tokens`` exceeds the model's limit.
            ValueError: the tokenizer has ids beyond the model's vocabulary, so the two do not belong together.
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
    info = {name: settings[name] for name in ("tokenizer_class", "model_max_length", "add_prefix_space") if name in settings}
    return info | tokenizer.named | {"chat_template": stored_source(folder)}
