"""An adapter's adapter_config.json (PEFT's `LoraConfig`): every field that could change a weight is either read or refused."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.config import InvalidModelConfig, read_json_object

CONFIG_FILE = "adapter_config.json"

IGNORED_FIELDS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "velora_config",
})  # fmt: skip
"""How and where the adapter was trained: visible in its tensors, or irrelevant here. PEFT, too, ignores `fan_in_fan_out` for models that
store weights as Qwen2 does."""
READ_FIELDS = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "use_dora", "init_lora_weights",
    "ensure_weight_tying", "trainable_token_indices",
})  # fmt: skip
UNSUPPORTED_FIELDS = {
    "alora_invocation_tokens": "applies to some tokens only (activated LoRA), and cannot be merged into the weights",
    "arrow_config": "chooses among adapters for every token (Arrow)",
    "kasa_config": "was trained on weights of which a part was cut off (KaSA)",
    "layer_replication": "repeats layers of the model",
    "lora_bias": "has biases of its own beside B",
    "monteclora_config": "samples its weights (MonteCLoRA)",
    "use_bdlora": "has block-diagonal matrices (BD-LoRA)",
    "use_qalora": "was trained on groups of inputs (QA-LoRA)",
}
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of `init_lora_weights` (prefixes) with which training started from changed weights of the base."""

BIASES = ("none", "all", "lora_only")

MAX_PATTERN = 256
QUANTIFIER = re.compile(r"(?<!\\)[*+?{]")
GROUP_QUANTIFIED = re.compile(r"(?<!\\)\)[*+?{]")
MAX_QUANTIFIERS = 2


class AdapterError(ValueError):
    """An adapter is damaged, of an unsupported kind, or of another model. The message says which, and what to do."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What the tensors of a LoRA adapter do not say themselves."""

    rank: int
    """`r`: rows of A, unless a pattern matches."""
    alpha: float
    """`lora_alpha`"""
    rank_stabilised: bool
    """`use_rslora`: the product is scaled by alpha / sqrt(rank) instead of alpha / rank."""
    has_magnitudes: bool
    """`use_dora`: every output has a length of its own (DoRA, arXiv 2402.09353)."""
    brings_biases: bool
    """`bias`: whether it replaces biases of the base, all of them or only those of the matrices that it changes (lora_only)."""
    keeps_head_tied: bool
    """`ensure_weight_tying`: if the base's head is its embedding, a change of one is a change of both."""
    token_rows: tuple[tuple[str, tuple[int, ...]], ...]
    """`trainable_token_indices`: rows that were trained individually, by the last part of their module's name."""
    base: str | None
    """The base, as its author's machine called it."""
    rank_pattern: tuple[tuple[str, int], ...] = field(default=())
    """Regular expressions of module names; the first that matches counts."""
    alpha_pattern: tuple[tuple[str, float], ...] = field(default=())

    @classmethod
    def from_folder(cls, folder: Path) -> "AdapterConfig":
        """Read ``folder / "adapter_config.json"``.

        Raises:
            AdapterError: see there; the message names the file.
        """
        path = folder / CONFIG_FILE
        try:
            return cls.from_dict(read_json_object(path))
        except (InvalidModelConfig, AdapterError) as error:
            raise AdapterError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "AdapterConfig":
        """Like `from_folder`, from the parsed JSON."""
        if raw.get("peft_type") != "LORA":
            raise AdapterError(f"peft_type is {raw.get('peft_type')!r:.80}, and only LORA is served; {_MERGE}")
        _refuse_unsupported(raw)
        biases = raw.get("bias") or "none"
        if biases not in BIASES:
            raise AdapterError(f"bias is {biases!r:.80}, expected {', '.join(BIASES)}")
        base = raw.get("base_model_name_or_path")
        return cls(
            rank=_rank(raw.get("r"), "r"),
            alpha=_alpha(raw.get("lora_alpha"), "lora_alpha"),
            rank_stabilised=_flag(raw, "use_rslora"),
            has_magnitudes=_flag(raw, "use_dora"),
            brings_biases=biases != "none",
            keeps_head_tied=_flag(raw, "ensure_weight_tying"),
            token_rows=_token_rows(raw.get("trainable_token_indices")),
            base=base if isinstance(base, str) and base else None,
            rank_pattern=tuple((pattern, _rank(rank, "rank_pattern")) for pattern, rank in _pattern(raw, "rank_pattern").items()),
            alpha_pattern=tuple((pattern, _alpha(alpha, "alpha_pattern")) for pattern, alpha in _pattern(raw, "alpha_pattern").items()),
        )

    def rank_of(self, module: str) -> int:
        """The rank for a module by its name in the model, such as ``model.layers.0.self_attn.q_proj``."""
        return next((rank for pattern, rank in self.rank_pattern if _matches(pattern, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A."""
        rank = self.rank_of(module)
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if _matches(pattern, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def is_of(self, base: str) -> bool | None:
        """Whether it was trained on ``base``, judged by the last part of both names. None: the configuration does not say."""
        return None if self.base is None else _plain_name(self.base) == _plain_name(base)


_MERGE = "merge it with PEFT (merge_and_unload), save the model, and serve that folder"


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for name, why in UNSUPPORTED_FIELDS.items():
        if raw.get(name):
            raise AdapterError(f"{name} is set: the adapter {why}; where PEFT can merge it, {_MERGE}")
    first = raw.get("init_lora_weights")
    if isinstance(first, str) and first.lower().startswith(BASE_CHANGING_INITS):
        raise AdapterError(
            f"init_lora_weights is {first!r:.80}: the base's weights were changed before training, and the adapter is relative "
            "to the changed ones; convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion), or " + _MERGE
        )
    unknown = sorted(name for name, value in raw.items() if name not in IGNORED_FIELDS | READ_FIELDS | UNSUPPORTED_FIELDS.keys() and value)
    if unknown:
        named = ", ".join(f"{name!r:.80}" for name in unknown[:5])
        raise AdapterError(
            f"{named} is unknown and might change weights; perhaps a newer PEFT wrote it; {_MERGE}, "
            "or remove the field if it does not affect the weights"
        )


def _token_rows(raw: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """A plain list means the embedding."""
    by_module = raw if isinstance(raw, dict) else {"embed_tokens": raw} if raw else {}
    for rows in by_module.values():
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows) or len(set(rows)) < len(rows):
            raise AdapterError(f"trainable_token_indices holds {rows!r:.80}, expected distinct token ids")
    return tuple((module, tuple(rows)) for module, rows in by_module.items())


def _pattern(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(f"{name} is a {type(patterns).__name__}, expected an object")
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN or len(QUANTIFIER.findall(pattern)) > MAX_QUANTIFIERS or GROUP_QUANTIFIED.search(pattern):
            # a matcher could take exponential time
            raise AdapterError(f"{name}: {pattern[:80]!r} is too complex for a module name")
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{name}: {pattern!r:.80} is not a regular expression ({error})") from error
    return patterns


def _matches(pattern: str, module: str) -> bool:
    """Like PEFT's ``get_pattern_key``."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _rank(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise AdapterError(f"{name} is {value!r:.80}, expected a whole number of at least 1")
    return value


def _alpha(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{name} is {value!r:.80}, expected a number")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name) or False
    if not isinstance(value, bool):
        raise AdapterError(f"{name} is {value!r:.80}, expected true or false")
    return value


def _plain_name(base: str) -> str:
    """/root/.cache/models--Qwen--Qwen2-7B/snapshots/9f3e/  ->  qwen2-7b;  unsloth/Qwen2-7B-bnb-4bit  ->  qwen2-7b"""
    parts = [part for part in re.split(r"[/\\]", base.partition("@")[0]) if part]
    kept = next((part.rsplit("--", 1)[-1] for part in parts if part.startswith("models--")), parts[-1] if parts else "")
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", kept.lower())
