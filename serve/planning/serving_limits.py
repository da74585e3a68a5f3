"""Layouts that can be planned but not served yet. To lift a limit, delete its line here; nothing else in planning knows it."""

from dataclasses import dataclass

from serve.planning.formats import STORED_FP8, Format


@dataclass(frozen=True)
class ServingLimit:
    """Something that can be planned but not served yet."""

    code: str
    sentence: str


FP8_CHECKPOINT = ServingLimit(
    "fp8", "checkpoints that are stored in FP8 are planned only: `manta serve` takes a plain one with `--quantize fp8`"
)


def serving_limits(format: Format) -> tuple[ServingLimit, ...]:
    """Why `manta serve` does not support this format today; empty if it does."""
    limits = ((FP8_CHECKPOINT, format is STORED_FP8),)
    return tuple(limit for limit, applies in limits if applies)
