"""Checkpoints that load in no time: random Qwen2 models of some two million parameters, with a real tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.engine.run.tiny_models import write_dense, write_moe
from tests.serve.vocabularies import write_smol


def write_tiny(folder: Path) -> Path:
    return _with_tokenizer(write_dense, folder)


def write_tiny_sparse(folder: Path) -> Path:
    """As 57B-A14B is built: a router over experts in every layer, and a shared expert beside them."""
    return _with_tokenizer(write_moe, folder, num_experts=16, num_experts_per_tok=4)


def write_tiny_57b(folder: Path) -> Path:
    """The heads and the experts of 57B-A14B, 28 with 4 and 8 of 64, at small widths."""
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 224}
    return _with_tokenizer(write_moe, folder, num_experts=64, num_experts_per_tok=8, **heads)


def _with_tokenizer(write: Callable[..., Path], folder: Path, **changes: int) -> Path:
    write_smol(folder)
    sizes = json.loads((folder / "config.json").read_text())
    return write(folder, vocab_size=sizes["vocab_size"], max_position_embeddings=2048, eos_token_id=2, bos_token_id=1, **changes)
