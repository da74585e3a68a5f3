"""Checkpoints of any size that take no room on a disk: headers, and a hole where the weights would be."""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from model.config import ModelConfig
from parallel.topology import Topology
from tests.serve.planning.allocated import allocate
from tests.serve.vocabularies import MODEL_CONFIG, write_smol

PLAIN = {**MODEL_CONFIG, "rope_theta": 1e6, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
SIZE_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
SIZE_72B = {"hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_key_value_heads": 8}
SIZE_57B_A14B = {
    **SIZE_7B, "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560,
    "shared_expert_intermediate_size": 20480, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
BYTES = {"BF16": 2, "F16": 2, "I32": 4}


def write_hollow(folder: Path, **changes: Any) -> Path:
    """A checkpoint in bfloat16, or as its `quantization_config` says by AWQ, whose weights are all 0; ``changes`` to `PLAIN` and to what is
    in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text()) if (file := folder / "config.json").exists() else {}
    file.write_text(json.dumps({**before, **PLAIN, **{name: before[name] for name in ("vocab_size",) if name in before}, **changes}))
    header, end = {}, 0
    for name, dtype, shape in _stored(folder):
        begin, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        out.truncate(8 + len(raw) + end)
    return folder


def write_too_large(folder: Path, *, times_memory: float = 1.5) -> Path:
    """Layers as Qwen2-72B has them, as many as this machine's memory cannot hold, with a real tokenizer."""
    write_smol(folder)
    one = sum(BYTES["BF16"] * math.prod(shape) for shape in shapes_of(write_hollow(folder, **SIZE_72B, num_hidden_layers=1)).values())
    return write_hollow(folder, **SIZE_72B, num_hidden_layers=math.ceil(times_memory * psutil.virtual_memory().total / one))


def _stored(folder: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of the tensors in the file."""
    quantisation = ModelConfig.from_checkpoint(folder).quantisation
    for name, shape in shapes_of(folder).items():
        if quantisation is None or not name.endswith("_proj.weight"):
            yield name, "BF16", shape
            continue
        module, (outputs, inputs) = name.removesuffix(".weight"), shape
        groups = inputs // (quantisation.group_size or inputs)
        yield f"{module}.qweight", "I32", (inputs, outputs // 8)
        yield f"{module}.qzeros", "I32", (groups, outputs // 8)
        yield f"{module}.scales", "F16", (groups, outputs)


def shapes_of(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Of the tensors that this config.json wants, by name."""
    config = ModelConfig.from_checkpoint(folder)
    return {binding.name: binding.slot.shape for binding in allocate(config, Topology(), 0).bindings()}
