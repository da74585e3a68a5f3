"""Invalid layouts are reported with every reason before anything starts."""

from dataclasses import dataclass

import pytest

from parallel.axes import head_share
from parallel.layout_check import InvalidLayout, check_layout, layout_problems
from parallel.pipeline import stage_layers
from parallel.topology import Topology


@dataclass(frozen=True)
class Moe:
    num_experts: int = 6


@dataclass(frozen=True)
class Shape:
    num_layers: int = 3
    num_heads: int = 4
    moe: Moe | None = None


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=4), Topology(pp=3), Topology(dp=5), Topology(tp=2, pp=2, dp=2)], ids=str)
def test_a_valid_layout_has_no_problems(topology: Topology) -> None:
    assert layout_problems(topology, Shape()) == layout_problems(topology, Shape(moe=Moe())) == ()
    check_layout(topology, Shape())


@pytest.mark.parametrize(
    ("topology", "shape", "reasons"),
    [
        (Topology(tp=5), Shape(), ["heads"]),
        (Topology(pp=4), Shape(), ["layers"]),
        (Topology(tp=2, ep=2), Shape(), ["dense"]),
        (Topology(tp=4, dp=2, ep=8), Shape(moe=Moe()), ["experts"]),
        (Topology(tp=5, pp=4, ep=5), Shape(), ["heads", "layers", "dense"]),
    ],
    ids=str,
)
def test_an_invalid_layout_is_reported_with_every_reason(topology: Topology, shape: Shape, reasons: list[str]) -> None:
    found = layout_problems(topology, shape)
    assert [misfit.reason for misfit in found] == reasons
    with pytest.raises(InvalidLayout) as caught:
        check_layout(topology, shape)
    assert all(misfit.sentence in str(caught.value) and "; use" in misfit.sentence for misfit in found)


def test_what_the_layers_would_reject_is_rejected_here() -> None:
    for ranks in range(1, 9):
        refused = {misfit.reason for misfit in layout_problems(Topology(tp=ranks), Shape()) + layout_problems(Topology(pp=ranks), Shape())}
        assert ("heads" in refused) == _raises(lambda ranks=ranks: head_share(4, 2, 0, ranks))
        assert ("layers" in refused) == _raises(lambda ranks=ranks: stage_layers(3, ranks, 0))


def _raises(call: object) -> bool:
    assert callable(call)
    try:
        call()
    except ValueError:
        return True
    return False
