"""The sampling parameters that a checkpoint's authors recommend, from generation_config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import InvalidModelConfig, ModelConfig, read_json_object, token_ids


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Defaults for parameters that a client omits. None = the file does not say."""

    eos_token_ids: tuple[int, ...] = ()
    """Every id that ends an answer; those of config.json if generation_config.json has none."""
    temperature: float | None = None
    """0 if the file says ``do_sample: false``: the authors recommend greedy decoding."""
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_checkpoint(cls, folder: Path, config: ModelConfig) -> "GenerationDefaults":
        """Read ``folder / "generation_config.json"``. Without the file only the end-of-sequence ids of ``config`` are known.

        Raises:
            InvalidModelConfig: the file is damaged, or a value cannot be used for sampling.
        """
        path = folder / "generation_config.json"
        if not path.exists():
            return cls(eos_token_ids=config.eos_token_ids)
        try:
            return cls._from_dict(read_json_object(path), config)
        except InvalidModelConfig as error:
            raise InvalidModelConfig(f"{path}: {error}") from error

    @classmethod
    def _from_dict(cls, raw: dict[str, Any], config: ModelConfig) -> "GenerationDefaults":
        greedy = raw.get("do_sample") is False
        top_k = _within(raw, "top_k", 0, float("inf"))
        return cls(
            eos_token_ids=token_ids(raw.get("eos_token_id"), "eos_token_id") or config.eos_token_ids,
            temperature=0.0 if greedy else _within(raw, "temperature", 0, 100),
            top_p=_within(raw, "top_p", 0, 1),
            top_k=None if top_k is None else int(top_k),
            repetition_penalty=_within(raw, "repetition_penalty", 0, 100),
        )


def _within(raw: dict[str, Any], field: str, low: float, high: float) -> float | None:
    value = raw.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidModelConfig(f"{field} is {value!r}, expected a number from {low:g} to {high:g}")
    return float(value)
