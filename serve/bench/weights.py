"""Weights that a step reads and that a token is multiplied with, from the model's shape alone."""

from model.config import ModelConfig
from model.formats import Formats
from parallel.weight_format import WeightFormat
from serve.bench.report import WeightBytes


def weight_bytes(config: ModelConfig, formats: Formats) -> WeightBytes:
    """For the whole model. Of a mixture of experts only the experts of one token are counted: a lower bound for any number of tokens."""
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    matrices = config.num_layers * attention + sum(_mlp_weights(config, layer) for layer in range(config.num_layers))
    table = config.vocab_size * config.hidden_size
    keys_and_values = 2 * config.hidden_size * config.head_dim * config.num_kv_heads
    last_layer = attention + _mlp_weights(config, config.num_layers - 1)
    return WeightBytes(
        per_step=round(matrices * formats.matrices.bytes_per_weight + table * formats.table.bytes_per_weight),
        multiply_adds_per_prompt_token=matrices - last_layer + keys_and_values,
        multiply_adds_per_token=matrices + table,
    )


def _mlp_weights(config: ModelConfig, layer: int) -> int:
    moe = config.moe
    if moe is None or not moe.is_sparse(layer):
        return 3 * config.hidden_size * config.intermediate_size
    inner = moe.experts_per_token * moe.expert_intermediate_size + moe.shared_intermediate_size
    return 3 * config.hidden_size * inner + config.hidden_size * (moe.num_experts + 1)


def format_name(format: WeightFormat) -> str:
    """``bf16_dot`` or ``int8``, the kind of a packed or quantised format; ``float32``, the dtype of any other."""
    kind = getattr(format, "kind", None)
    return str(kind) if kind is not None else str(getattr(format, "dtype", format)).removeprefix("torch.")
