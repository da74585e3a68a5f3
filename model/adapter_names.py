"""What the tensors in an adapter's file are called (`model.adapter` says what they are), and what the names alone tell. Without torch."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from model.adapter_config import AdapterConfig
from model.checkpoint_folder import open_folder

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
DECODER = "model."
"""Before the names of a decoder's tensors in a model with a head; an adapter that was trained on the bare decoder lacks it."""
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
ROWS = ".token_adapter.trainable_tokens_delta"
PART = re.compile(rf"(.+)\.({'|'.join(map(re.escape, (A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE)))})")
LENGTH_BYTES, MAX_HEADER_BYTES = 8, 16 * 2**20
"""Of a safetensors file: its header's length in bytes stands before it; an adapter's has some thousand names."""


def unties_head(stored_names: Iterable[str], config: AdapterConfig) -> bool:
    """Whether a head that is the embedding cannot be any more: what is trained of the one leaves the other as it was."""
    changed = {matrix for name in stored_names if (matrix := _changed(name)) is not None}
    embedding = not changed.isdisjoint({EMBEDDING, DECODER + EMBEDDING})
    return (embedding or HEAD in changed) and not (embedding and config.keeps_head_tied)


def _changed(stored_name: str) -> str | None:
    """The tensor of the model that one of the adapter's is about; None: single rows of it only."""
    name = stored_name.removeprefix(PREFIX)
    if found := PART.fullmatch(name):
        return f"{found[1]}.weight"
    return None if name.endswith(ROWS) else name.replace(".base_layer.", ".")


def stored_names(place: Path | str) -> frozenset[str]:
    """Of the adapter's tensors, unchecked (`model.adapter.Adapter` checks).

    Raises:
        Exception: they cannot be read; each store's library has its own.
    """
    source = open_folder(place).open(ADAPTER_FILE)
    try:
        length = bytearray(LENGTH_BYTES)
        source.read([(0, memoryview(length))])
        header = bytearray(min(int.from_bytes(length, "little"), source.size, MAX_HEADER_BYTES))
        source.read([(LENGTH_BYTES, memoryview(header))])
    finally:
        source.close()
    names = json.loads(header)
    if not isinstance(names, dict):
        raise ValueError(f"{source.name} has a damaged header (it is no JSON object)")
    return frozenset(names) - {"__metadata__"}
