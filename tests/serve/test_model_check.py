"""What is wrong with a model or its layout is told before Ray is even started."""

import json
from pathlib import Path

import pytest

from parallel.topology import Topology
from serve.model_check import UnusableCheckpoint, check_model
from tests.serve.planning.questions import CONFIGS


@pytest.mark.parametrize(
    ("name", "topology", "reason"),
    [
        ("0.5B", Topology(tp=15), "14 query heads cannot be shared over tp=15 ranks; use at most 14"),
        ("7B", Topology(tp=2, ep=2), "no routed experts to spread over ep=2; use ep=1"),
        ("tiny", Topology(pp=4), "3 layers cannot fill 4 stages; use pp=3 at most"),
        ("tiny_moe", Topology(tp=7, ep=7), "6 routed experts cannot be spread over ep=7 positions; use ep=6 at most"),
    ],
    ids=str,
)
def test_a_layout_that_the_model_cannot_have_is_refused_from_its_config_alone(tmp_path: Path, name: str, topology: Topology, reason: str):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    with pytest.raises(UnusableCheckpoint, match=reason):
        check_model(tmp_path, topology)
