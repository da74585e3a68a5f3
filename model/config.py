"""A checkpoint's config.json: every field is read by name, and none is guessed. Does not import torch, because fronts read it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from model.quantisation import InvalidQuantisation, Quantisation, UnsupportedQuantisation

Architecture = Literal["Qwen2ForCausalLM", "Qwen2MoeForCausalLM"]
DENSE: Architecture = "Qwen2ForCausalLM"
MOE: Architecture = "Qwen2MoeForCausalLM"
BARE = "Qwen2Model"
"""A dense decoder without a head, as embedding models are stored."""

DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes in which a model can be computed, by the names that config.json and torch use."""

T = TypeVar("T")
D = TypeVar("D")


class InvalidModelConfig(ValueError):
    """config.json is missing or not a JSON object, or a field is missing or invalid."""


class UnsupportedModel(ValueError):
    """A well-formed config.json of a model that is not supported. The message names what is not."""


class ContextTooLong(ValueError):
    """The configured context is longer than the model's limit."""

    def __init__(self, *, asked_tokens: int, limit_tokens: int, dual_chunk_tokens: int | None = None) -> None:
        """``dual_chunk_tokens``: see `ModelConfig.dual_chunk_tokens`."""
        cut = f" (of {dual_chunk_tokens}: beyond them it needs dual chunk attention, which is not supported)" if dual_chunk_tokens else ""
        super().__init__(
            f"max_context_tokens={asked_tokens} is more than the {limit_tokens} tokens that this model supports{cut}; leave it out, or "
            "copy the checkpoint and add rope_scaling (YaRN) to its config.json, where the model's card allows it"
        )


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """Rotary embedding extended to longer contexts (YaRN, arXiv 2309.00071)."""

    factor: float
    original_max_tokens: int
    """`original_max_position_embeddings`: the context the model was trained with."""
    attention_factor: float | None
    """Multiplies the rotated queries and keys. None = 0.1 ln(factor) + 1, as in the paper."""
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv 2104.09864)."""

    theta: float
    yarn: YarnConfig | None


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The sparse layers of a Qwen2-MoE."""

    num_experts: int
    experts_per_token: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    renormalise: bool
    """`norm_topk_prob`: whether the weights of a token's chosen experts are scaled to sum to one."""
    sparse_step: int
    """`decoder_sparse_step`"""
    dense_layers: tuple[int, ...]
    """`mlp_only_layers`"""

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a Qwen2 or Qwen2-MoE model.

    config.json does not say how many of the ``vocab_size`` rows are real tokens; only the tokenizer knows. The sampler gets that number
    separately (`engine.run.settings.RunnerConfig.num_real_tokens`) and masks the padding rows.
    """

    architecture: Architecture
    vocab_size: int
    """Rows of the embedding matrix, padding rows included."""
    hidden_size: int
    intermediate_size: int
    """Width of the dense MLPs."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    """`max_position_embeddings`, or the context to which YaRN extends it; see also `dual_chunk_tokens`."""
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    tied_embeddings: bool
    dtype: str
    """Of the released weights: one of `DTYPES`."""
    moe: MoeConfig | None
    eos_token_ids: tuple[int, ...]
    """`eos_token_id`. Overridden by generation_config.json if that names any (`GenerationDefaults`)."""
    is_causal: bool = True
    """Whether tokens attend only to earlier ones. False for some embedding models, which cannot generate."""
    is_bare: bool = False
    """Stored as the decoder alone: no head, and names without the prefix ``model.``. Logits, computed with the embedding, are
    meaningless."""
    quantisation: Quantisation | None = None
    """`quantization_config`: how the layers' matrices are stored; None if they are not quantised."""
    dual_chunk_tokens: int | None = None
    """`max_position_embeddings` if `max_context_tokens` is lower because longer contexts need dual chunk attention (arXiv 2402.17463,
    `dual_chunk_attention_config`: Qwen2.5-1M). Up to the training context that is ordinary attention."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise InvalidModelConfig(f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise InvalidModelConfig(f"rotary embedding needs heads of even width, not {self.head_dim}")
        if self.moe is not None and self.moe.experts_per_token > self.moe.num_experts:
            raise InvalidModelConfig(f"num_experts_per_tok={self.moe.experts_per_token} of num_experts={self.moe.num_experts}")

    def context_limit(self, lowered_to: int | None) -> int:
        """The most tokens of a sequence, prompt and answer together: ``lowered_to``, or else `max_context_tokens`.

        Raises:
            ContextTooLong: ``lowered_to`` exceeds the model's limit.
        """
        if lowered_to is not None and lowered_to > self.max_context_tokens:
            raise ContextTooLong(asked_tokens=lowered_to, limit_tokens=self.max_context_tokens, dual_chunk_tokens=self.dual_chunk_tokens)
        return lowered_to or self.max_context_tokens

    @classmethod
    def from_checkpoint(cls, folder: Path) -> "ModelConfig":
        """Read ``folder / "config.json"``.

        Raises:
            InvalidModelConfig, UnsupportedModel: see there; the message names the file.
        """
        path = folder / "config.json"
        try:
            return cls.from_dict(read_json_object(path))
        except (InvalidModelConfig, UnsupportedModel) as error:
            raise type(error)(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Like `from_checkpoint`, from the parsed JSON."""
        architecture, is_bare = _architecture(raw), raw.get("architectures") == [BARE]
        _refuse_unsupported(raw)
        num_heads = _positive(raw, "num_attention_heads")
        hidden_size = _positive(raw, "hidden_size")
        rope = _rope(raw)
        max_positions = _positive(raw, "max_position_embeddings")
        max_context_tokens = _max_context_tokens(_plain_positions(raw, max_positions), rope)
        return cls(
            architecture=architecture,
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_layers=_positive(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_positive(raw, "num_key_value_heads"),
            head_dim=_head_dim(raw, hidden_size, num_heads),
            max_context_tokens=max_context_tokens,
            rms_norm_eps=_number(raw, "rms_norm_eps"),
            rope=rope,
            qkv_bias=_optional(raw, "qkv_bias", bool, True),  # Qwen2 always has it; Qwen2-MoE's files may say otherwise
            tied_embeddings=is_bare or _required(raw, "tie_word_embeddings", bool),
            is_causal=_is_causal(raw),
            is_bare=is_bare,
            dtype=_dtype(raw),
            moe=_moe(raw) if architecture == MOE else None,
            eos_token_ids=token_ids(raw.get("eos_token_id"), "eos_token_id"),
            quantisation=_quantisation(raw),
            dual_chunk_tokens=max_positions if max_context_tokens < max_positions else None,
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InvalidModelConfig: the file is missing, or holds something else.
    """
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InvalidModelConfig(f"there is no {path.name} in {path.parent}") from None
    except ValueError as error:
        raise InvalidModelConfig(f"{path.name} is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise InvalidModelConfig(f"{path.name} holds a {type(raw).__name__}, not an object")
    return raw


def token_ids(value: Any, field: str) -> tuple[int, ...]:
    """Hugging Face writes one id, a list of ids, or null."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for token in ids:
        if type(token) is not int or token < 0:
            raise InvalidModelConfig(f"{field} holds {token!r}, which is not a token id")
    return ids


def _architecture(raw: Mapping[str, Any]) -> Architecture:
    named = raw.get("architectures")
    if named in ([DENSE], [BARE]):
        return DENSE
    if named == [MOE]:
        return MOE
    if not named:
        raise InvalidModelConfig("architectures is missing: it says which model this is")
    raise UnsupportedModel(f"architectures {named} is not supported; {DENSE} and {MOE} are")


def _is_causal(raw: Mapping[str, Any]) -> bool:
    """`is_causal` if it is present. gte-Qwen2's files omit it: its own `modeling_qwen.Qwen2Model` has no causal mask."""
    said = _optional(raw, "is_causal", bool, None)
    if said is not None:
        return said
    own_code = _optional(raw, "auto_map", dict, {}).get("AutoModel", "")
    return str(own_code).rsplit("--", 1)[-1] != "modeling_qwen.Qwen2Model"


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    if raw.get("use_sliding_window"):  # if it is false, sliding_window is a meaningless leftover
        raise UnsupportedModel("use_sliding_window is true, and sliding-window attention is not supported")
    if "sliding_attention" in _optional(raw, "layer_types", list, []):
        raise UnsupportedModel("layer_types asks for sliding-window attention, which is not supported")
    activation = _required(raw, "hidden_act", str)
    if activation != "silu":
        raise UnsupportedModel(f"hidden_act {activation!r} is not supported; Qwen2 uses 'silu'")


def _quantisation(raw: Mapping[str, Any]) -> Quantisation | None:
    if raw.get("quantization_config") is None:
        return None
    try:
        return Quantisation.from_dict(_required(raw, "quantization_config", dict))
    except InvalidQuantisation as error:
        raise InvalidModelConfig(f"quantization_config: {error}") from error
    except UnsupportedQuantisation as error:
        raise UnsupportedModel(f"quantization_config: {error}") from error


def _head_dim(raw: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if raw.get("head_dim") is not None:
        return _positive(raw, "head_dim")
    if hidden_size % num_heads:
        raise InvalidModelConfig(
            f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}, and there is no head_dim"
        )
    return hidden_size // num_heads


def _dtype(raw: Mapping[str, Any]) -> str:
    """transformers 4 writes `torch_dtype`, transformers 5 `dtype`."""
    if raw.get("dtype") is None and raw.get("torch_dtype") is None:
        raise InvalidModelConfig("neither dtype nor torch_dtype is present")
    name = _required(raw, "torch_dtype" if raw.get("dtype") is None else "dtype", str)
    if name not in DTYPES:
        raise UnsupportedModel(f"dtype {name!r} is not supported; {', '.join(DTYPES)} are")
    return name


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    """Supports both spellings: `rope_theta` with an optional `rope_scaling`, and transformers 5's `rope_parameters` with everything."""
    if raw.get("rope_parameters") is not None:
        settings = _required(raw, "rope_parameters", dict)
        theta = _number(settings, "rope_theta")
    else:
        settings = _optional(raw, "rope_scaling", dict, {})
        theta = _number(raw, "rope_theta")
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta, yarn=None)
    if kind == "yarn":
        return RopeConfig(theta=theta, yarn=_yarn(settings))
    raise UnsupportedModel(f"rope type {kind!r} is not supported; 'default' and 'yarn' are")


YARN_FIELDS = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"
}  # fmt: skip


def _yarn(settings: Mapping[str, Any]) -> YarnConfig:
    if unknown := sorted(set(settings) - YARN_FIELDS):
        raise UnsupportedModel(f"YaRN with {', '.join(unknown)} is not supported")
    attention_factor = settings.get("attention_factor")
    return YarnConfig(
        factor=_number(settings, "factor"),
        original_max_tokens=_positive(settings, "original_max_position_embeddings"),
        attention_factor=None if attention_factor is None else _number(settings, "attention_factor"),
        beta_fast=_number({"beta_fast": 32.0, **settings}, "beta_fast"),  # the paper's defaults, section 3.2
        beta_slow=_number({"beta_slow": 1.0, **settings}, "beta_slow"),
    )


def _plain_positions(raw: Mapping[str, Any], max_positions: int) -> int:
    """The positions that ordinary attention supports: `max_position_embeddings`, or the training context if dual chunk attention extends
    it."""
    chunks = _optional(raw, "dual_chunk_attention_config", dict, {})
    return min(max_positions, _positive(chunks, "original_max_position_embeddings")) if chunks else max_positions


def _max_context_tokens(max_positions: int, rope: RopeConfig) -> int:
    """The model cards say to add `rope_scaling` and leave `max_position_embeddings` unchanged, so YaRN's own range counts."""
    return max_positions if rope.yarn is None else max(max_positions, int(rope.yarn.original_max_tokens * rope.yarn.factor))


def _moe(raw: Mapping[str, Any]) -> MoeConfig:
    return MoeConfig(
        num_experts=_positive(raw, "num_experts"),
        experts_per_token=_positive(raw, "num_experts_per_tok"),
        expert_intermediate_size=_positive(raw, "moe_intermediate_size"),
        shared_intermediate_size=_positive(raw, "shared_expert_intermediate_size"),
        renormalise=_required(raw, "norm_topk_prob", bool),
        sparse_step=_positive(raw, "decoder_sparse_step"),
        dense_layers=tuple(_optional(raw, "mlp_only_layers", list, [])),  # missing in the first releases, which have none
    )


def _required(raw: Mapping[str, Any], field: str, kind: type[T]) -> T:
    value = raw.get(field)
    if value is None:
        raise InvalidModelConfig(f"{field} is missing")
    if not isinstance(value, kind):
        raise InvalidModelConfig(f"{field} is {value!r}, expected {kind.__name__}")
    return value


def _optional(raw: Mapping[str, Any], field: str, kind: type[T], absent: D) -> T | D:
    return absent if raw.get(field) is None else _required(raw, field, kind)


def _positive(raw: Mapping[str, Any], field: str) -> int:
    value = _required(raw, field, int)
    if isinstance(value, bool) or value < 1:
        raise InvalidModelConfig(f"{field} is {value!r}, expected a whole number of at least 1")
    return value


def _number(raw: Mapping[str, Any], field: str) -> float:
    value = _required(raw, field, object)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InvalidModelConfig(f"{field} is {value!r}, expected a number above 0")
    return float(value)
