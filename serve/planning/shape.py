"""The shape of a model as far as a plan needs it, from its config.json alone.

`model.config` reads the same file for serving and is stricter; a test compares the two.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.quantisation import InvalidQuantisation, Quantisation, UnsupportedQuantisation
from serve.planning.errors import PlanError
from serve.planning.formats import BF16, STORED_FP8, STORED_QUANTISED, Format

DENSE, MOE = "Qwen2ForCausalLM", "Qwen2MoeForCausalLM"


@dataclass(frozen=True, kw_only=True)
class MoeShape:
    """The sparse layers. Fields as in `model.config.MoeConfig`."""

    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0

    def distinct_experts(self, tokens: float) -> float:
        """Expected number of distinct experts that ``tokens`` tokens use under uniform routing: E (1 - (1 - k/E)^tokens)."""
        unused: float = (1 - self.experts_per_token / self.num_experts) ** tokens
        return self.num_experts * (1 - unused)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """One Qwen2 or Qwen2-MoE. Fields as in `model.config.ModelConfig`."""

    name: str
    """The value for model.source of `manta serve`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    tied_embeddings: bool
    qkv_bias: bool = True
    moe: MoeShape | None = None
    format: Format = BF16
    """Format of the checkpoint's large matrices in memory, unless another is requested."""

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and self.moe.is_sparse(layer)


def shape_of_checkpoint(folder: Path, *, name: str) -> ModelShape:
    """Read ``folder / "config.json"``; ``folder`` may be that file itself.

    Raises:
        PlanError: the file does not exist, or is not the configuration of a Qwen2 model.
    """
    path = folder if folder.is_file() else folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except OSError:
        raise PlanError(f"there is no {path}; give a checkpoint folder, its config.json, or a name such as Qwen2-7B-Instruct") from None
    except ValueError as error:
        raise PlanError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(raw, dict):
        raise PlanError(f"{path} does not contain a JSON object; give the config.json of a checkpoint")
    try:
        return shape_of_config(raw, name=name)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error


def shape_of_config(raw: Mapping[str, Any], *, name: str) -> ModelShape:
    """The shape of a model, from its config.json.

    Raises:
        PlanError: a field is missing or invalid, or the architecture is not supported.
    """
    if raw.get("architectures") not in ([DENSE], [MOE]):
        raise PlanError(f"architectures is {raw.get('architectures')}; plan for a model of {DENSE} or {MOE}")
    hidden_size, num_heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
    num_kv_heads = _positive(raw, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise PlanError(f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}; correct the file")
    return ModelShape(
        name=name,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=_positive(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_positive(raw, "head_dim") if raw.get("head_dim") is not None else hidden_size // num_heads,
        max_context_tokens=_max_context_tokens(raw),
        tied_embeddings=_flag(raw, "tie_word_embeddings"),
        qkv_bias=raw.get("qkv_bias") is not False,
        moe=_moe(raw) if raw["architectures"] == [MOE] else None,
        format=_format(raw),
    )


def _moe(raw: Mapping[str, Any]) -> MoeShape:
    dense_layers = raw.get("mlp_only_layers") or []
    if not isinstance(dense_layers, list):
        raise PlanError(f"mlp_only_layers is {dense_layers!r}, expected a list")
    return MoeShape(
        num_experts=_positive(raw, "num_experts"),
        experts_per_token=_positive(raw, "num_experts_per_tok"),
        expert_intermediate_size=_positive(raw, "moe_intermediate_size"),
        shared_intermediate_size=_positive(raw, "shared_expert_intermediate_size"),
        sparse_step=_positive(raw, "decoder_sparse_step"),
        dense_layers=tuple(dense_layers),
    )


def _max_context_tokens(raw: Mapping[str, Any]) -> int:
    """The context limit, with YaRN if it is configured, but without dual chunk attention; as in `model.config`."""
    trained, chunks = _positive(raw, "max_position_embeddings"), raw.get("dual_chunk_attention_config")
    if chunks:
        if not isinstance(chunks, dict):
            raise PlanError(f"dual_chunk_attention_config is {chunks!r}, expected an object")
        trained = min(trained, _positive(chunks, "original_max_position_embeddings"))
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or "yarn" not in (scaling.get("rope_type"), scaling.get("type")):
        return trained
    factor = scaling.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise PlanError(f"the YaRN factor is {factor!r}, expected a number above 0")
    return max(trained, int(_positive(scaling, "original_max_position_embeddings") * factor))


def _format(raw: Mapping[str, Any]) -> Format:
    """The format given by `quantization_config` of GPTQ, AWQ and FP8 checkpoints."""
    described = raw.get("quantization_config")
    if described is None:
        return BF16
    if not isinstance(described, dict):
        raise PlanError(f"quantization_config is {described!r}, expected an object")
    if described.get("quant_method") == "fp8":
        return STORED_FP8
    try:
        quantisation = Quantisation.from_dict(described)
    except (InvalidQuantisation, UnsupportedQuantisation) as error:
        raise PlanError(f"quantization_config: {error}; plan from the plain checkpoint, with --quantize") from error
    return STORED_QUANTISED[quantisation.preferred_kind()]


def _positive(raw: Mapping[str, Any], field: str) -> int:
    value = raw.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{field} is {value!r}, expected a whole number of at least 1")
    return value


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field)
    if not isinstance(value, bool):
        raise PlanError(f"{field} is {value!r}, expected true or false")
    return value
