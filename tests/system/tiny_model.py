"""A checkpoint that loads in no time: a random Qwen2 of some two million parameters, with a real tokenizer."""

import json
from pathlib import Path

from tests.engine.run.tiny_models import write_dense
from tests.serve.vocabularies import write_smol


def write_tiny(folder: Path) -> Path:
    write_smol(folder)
    sizes = json.loads((folder / "config.json").read_text())
    return write_dense(folder, vocab_size=sizes["vocab_size"], max_position_embeddings=2048, eos_token_id=2, bos_token_id=1)
