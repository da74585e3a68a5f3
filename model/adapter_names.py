"""Names of the tensors in an adapter's file, and what follows from them alone.

See `model.adapter` for their meaning. Does not import torch.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from model.adapter_config import AdapterConfig
from model.checkpoint_folder import open_folder

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
DECODER = "model."
"""Prefix of a decoder's tensors in a model with a head. Adapters that were trained on the bare decoder lack it."""
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
ROWS = ".token_adapter.trainable_tokens_delta"
PART = re.compile(rf"(.+)\.({'|'.join(map(re.escape, (A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE)))})")
LENGTH_BYTES, MAX_HEADER_BYTES = 8, 16 * 2**20
"""A safetensors file starts with the length of its header in bytes. An adapter's header has some thousand names."""


def unties_head(stored_names: Iterable[str], config: AdapterConfig) -> bool:
    """Whether the adapter changes a tied embedding or head without the other, so that they must become two tensors."""
    changed = {matrix for name in stored_names if (matrix := _changed(name)) is not None}
    embedding = not changed.isdisjoint({EMBEDDING, DECODER + EMBEDDING})
    return (embedding or HEAD in changed) and not (embedding and config.keeps_head_tied)


def _changed(stored_name: str) -> str | None:
    """The tensor of the model that one of the adapter's changes; None if it only replaces single rows."""
    name = stored_name.removeprefix(PREFIX)
    if found := PART.fullmatch(name):
        return f"{found[1]}.weight"
    return None if name.endswith(ROWS) else name.replace(".base_layer.", ".")


def stored_names(location: Path | str) -> frozenset[str]:
    """The names of the adapter's tensors, unchecked (`model.adapter.Adapter` checks them).

    Raises:
        Exception: they cannot be read; each store's library has its own errors.
    """
    source = open_folder(location).open(ADAPTER_FILE)
    try:
        length = bytearray(LENGTH_BYTES)
        source.read([(0, memoryview(length))])
        header = bytearray(min(int.from_bytes(length, "little"), source.size, MAX_HEADER_BYTES))
        source.read([(LENGTH_BYTES, memoryview(header))])
    finally:
        source.close()
    names = json.loads(header)
    if not isinstance(names, dict):
        raise ValueError(f"{source.name} has a damaged header (it is not a JSON object)")
    return frozenset(names) - {"__metadata__"}
