"""What ranks need of their hosts, by layout. Memory is tested with the doctor (`test_doctor_command.py`)."""

import pytest

from parallel.topology import Topology
from serve.config import ServeConfig
from serve.host_requirements import groups_that_all_reduce, host_requirements


@pytest.mark.parametrize(
    ("topology", "groups"),
    [
        (Topology(), ()),
        (Topology(dp=2, pp=2), ()),
        (Topology(tp=2, pp=2), ((0, 1), (2, 3))),
        (Topology(tp=2, dp=2), ((0, 1), (2, 3))),
        (Topology(tp=2, dp=2, ep=2), ((0, 1), (2, 3))),
        (Topology(tp=1, dp=4, ep=2), ((0, 1), (2, 3))),
        (Topology(tp=4, ep=4), ((0, 1, 2, 3),)),
    ],
    ids=str,
)
def test_the_groups_are_those_that_add_up_in_every_layer(topology: Topology, groups: tuple[tuple[int, ...], ...]) -> None:
    assert groups_that_all_reduce(topology) == groups


def test_they_are_part_of_what_is_needed() -> None:
    assert host_requirements(None, ServeConfig.model_validate({"parallel": {"tensor": 2}})).groups == ((0, 1),)
