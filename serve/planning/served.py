"""What `manta serve` takes today. The one place in planning that knows: where a limit falls, its line here falls with it."""

from dataclasses import dataclass

from serve.planning.formats import BF16, Format


@dataclass(frozen=True)
class Limit:
    """Something that can be planned and not yet be served."""

    code: str
    sentence: str


QUANTISED = Limit("quantised", "quantised checkpoints are planned only: `manta serve` loads plain ones, which `--quantize` rounds")


def limits_today(format: Format) -> tuple[Limit, ...]:
    """Why `manta serve` does not take this layout today; none if it does."""
    limits = ((QUANTISED, format is not BF16 and format.quantize is None),)
    return tuple(limit for limit, applies in limits if applies)
