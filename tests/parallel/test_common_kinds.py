"""Agreement on weight kinds between ranks on different processors."""

from unittest.mock import patch

from parallel.common_kinds import common_kinds
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.native.library import available_kinds
from parallel.topology import Topology
from tests.ranks import run_ranks

HERE = [("bf16", "fp32", "int8", "int4", "bf16_dot", "int8_dot"), ("bf16", "fp32", "int8", "int4", "int8_dot", "int4_dot")]


def agreed(groups: ParallelGroups, here: list[tuple[str, ...]]) -> frozenset[str]:
    with patch("parallel.common_kinds.available_kinds", lambda: frozenset(here[groups.rank])):
        return common_kinds(groups.stage)


def test_ranks_agree_on_the_kinds_that_all_of_them_support() -> None:
    assert run_ranks(Topology(tp=2), agreed, HERE) == [frozenset(HERE[0]) & frozenset(HERE[1])] * 2


def test_if_one_rank_has_no_kernels_no_kind_is_common() -> None:
    assert run_ranks(Topology(tp=2), agreed, [HERE[0], ()]) == [frozenset()] * 2


def test_a_single_rank_uses_its_own_kinds() -> None:
    assert common_kinds(single_rank_groups().stage) == available_kinds()
