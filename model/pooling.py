"""How a checkpoint pools hidden states into one embedding, from the files of sentence-transformers.

`modules.json` lists the parts of a pipeline: the transformer, `1_Pooling/config.json` (which tokens' hidden states count), and whether
the result is scaled to length 1. `model.config.ModelConfig.is_causal` says whether tokens attend to later ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.config import BARE, InvalidModelConfig, UnsupportedModel, read_json_object

PoolingKind = Literal["last", "mean", "first"]
"""The hidden state of the last token, the mean of all, or that of the first."""

MODULES = "modules.json"
KINDS_BY_FLAG: dict[str, PoolingKind] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
}
"""The names in `1_Pooling/config.json`."""
KINDS_BY_MODE: dict[str, PoolingKind] = {"lasttoken": "last", "mean": "mean", "cls": "first"}
"""The names in newer files, under `pooling_mode`."""
TRANSFORMER, POOLING, NORMALIZE = "Transformer", "Pooling", "Normalize"


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """How an embedding model pools."""

    kind: PoolingKind
    normalise: bool
    """Scaled to length 1."""

    @classmethod
    def from_checkpoint(cls, folder: Path) -> "PoolingConfig | None":
        """Read the files in ``folder``. None for a generative model without settings for embeddings.

        A decoder without a head (`Qwen2Model`) can only embed: without `modules.json` its embedding is the last token's state, scaled to
        length 1.

        Raises:
            InvalidModelConfig: a file is damaged, or missing although another one names it.
            UnsupportedModel: a kind of pooling, or another part of the pipeline, that is not supported.
        """
        if (folder / MODULES).exists():
            return _from_modules(folder)
        bare = read_json_object(folder / "config.json").get("architectures") == [BARE]
        return cls(kind="last", normalise=True) if bare else None


def _from_modules(folder: Path) -> PoolingConfig:
    kinds = {_last_part(entry.get("type")): entry for entry in _entries(folder / MODULES)}
    if unknown := sorted(kinds.keys() - {TRANSFORMER, POOLING, NORMALIZE}):
        raise UnsupportedModel(f"{folder / MODULES}: embeddings with {', '.join(unknown)} are not supported")
    if POOLING not in kinds:
        raise InvalidModelConfig(f"{folder / MODULES} names no {POOLING}")
    subfolder = kinds[POOLING].get("path")
    if not isinstance(subfolder, str) or "/" in subfolder or subfolder.startswith("."):
        raise InvalidModelConfig(f"{folder / MODULES}: the path of {POOLING} must be a folder beside it")
    return PoolingConfig(kind=_kind(folder / subfolder / "config.json"), normalise=NORMALIZE in kinds)


def _entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise InvalidModelConfig(f"{path} is not JSON ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidModelConfig(f"{path} is not a list of objects")
    return entries


def _last_part(type_: Any) -> str:
    """ "sentence_transformers.models.Pooling" as "Pooling"."""
    return str(type_).rsplit(".", 1)[-1]


def _kind(path: Path) -> PoolingKind:
    raw = read_json_object(path)
    if (mode := raw.get("pooling_mode")) is not None:
        if mode not in KINDS_BY_MODE:
            raise UnsupportedModel(f"{path}: pooling {mode!r} is not supported; {', '.join(KINDS_BY_MODE)} are")
        return KINDS_BY_MODE[mode]
    chosen = [name for name, value in raw.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in KINDS_BY_FLAG:
        raise UnsupportedModel(
            f"{path}: pooling by {', '.join(chosen) or 'nothing'} is not supported; one of {', '.join(KINDS_BY_FLAG)} is"
        )
    return KINDS_BY_FLAG[chosen[0]]
