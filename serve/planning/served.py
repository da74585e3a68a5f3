"""What `manta serve` takes today. The one place in planning that knows: where a limit falls, its line here falls with it."""

from dataclasses import dataclass

from serve.planning.formats import BF16, Format


@dataclass(frozen=True)
class Limit:
    """Something that can be planned and not yet be served."""

    code: str
    sentence: str


HOSTS = Limit("hosts", "several hosts are planned only: `manta serve` starts a Ray of its own on one host")
QUANTISED = Limit("quantised", "quantised checkpoints are planned only: `manta serve` loads plain ones, which `--quantize` rounds")


def limits_today(format: Format, *, hosts: int) -> tuple[Limit, ...]:
    """Why `manta serve` does not take this layout today; none if it does. ``hosts``: over which replicas are spread."""
    limits = (
        (HOSTS, hosts > 1),
        (QUANTISED, format is not BF16 and format.quantize is None),
    )
    return tuple(limit for limit, applies in limits if applies)
