"""What is wrong with a model or its layout is told before Ray is even started."""

import json
import shutil
from pathlib import Path

import pytest

from parallel.topology import Topology
from serve.config import ServeConfig
from serve.model_check import UnusableCheckpoint, check_model, with_local_draft_model
from tests.serve.planning.plan_inputs import CONFIGS


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


def test_a_context_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["0.5B"]))
    with pytest.raises(UnusableCheckpoint, match="max_context_tokens=40000 is more than the 32768 tokens"):
        check_model(tmp_path, Topology(), max_context_tokens=40_000)


def test_a_draft_model_is_found_and_looked_over_as_the_model_is(tiny_folder: Path, tmp_path: Path) -> None:
    def speculating(source: Path | str) -> ServeConfig:
        return ServeConfig(engine={"speculate": "draft"}, runner={"draft_model": str(source)})

    assert with_local_draft_model(ServeConfig(), tiny_folder) == ServeConfig()
    assert with_local_draft_model(speculating(tiny_folder), tiny_folder).runner.draft_model == str(tiny_folder)
    with pytest.raises(UnusableCheckpoint, match=r"runner\.draft_model: there is no folder"):
        with_local_draft_model(speculating(tmp_path / "nowhere"), tiny_folder)
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary, added = tokenizer["model"]["vocab"], {token["id"] for token in tokenizer["added_tokens"]}
    first, second = [text for text, number in vocabulary.items() if number not in added][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnusableCheckpoint, match=r"runner\.draft_model: .* has a different vocabulary: 2 of"):
        with_local_draft_model(speculating(other), tiny_folder)
