"""`manta doctor` as an operator calls it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cluster.directory import RankPlace, ReplicaRecord
from cluster.doctor.facts import Need
from cluster.doctor.findings import Finding, Severity
from cluster.health import State
from engine.load_stats import LoadStats
from engine.run.settings import QuantizeName, RunnerConfig
from model.adapter import Adapter
from model.adapter_names import ADAPTER_FILE
from model.config import ModelConfig
from serve.cli import app
from serve.commands.doctor import paragraph
from serve.commands.resolve_models import find_local_models
from serve.commands.serve import loading_lines
from serve.config import ModelSettings, ParallelSettings, ServeConfig
from serve.host_requirements import host_requirements
from serve.terminal import UNLIMITED
from tests.cluster.fakes import record
from tests.model.adapters import write_adapter
from tests.model.quantise_checkpoint import GPTQ
from tests.serve.planning.plan_inputs import CONFIGS


def test_this_machine_is_told_of_in_json() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert [each["rank"] for each in told["facts"]] == [0]
    assert {finding["severity"] for finding in told["findings"]} <= {"note", "warning", "fatal"}
    assert done.exit_code == any(finding["severity"] == "fatal" for finding in told["findings"])


def test_a_damaged_checkpoint_is_fatal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert done.exit_code == 1
    assert "fatal" in done.stdout
    assert "architectures" in done.stdout


FINDING = Finding(
    severity=Severity.WARNING,
    check="shared memory",
    host="gpu-1",
    found="/dev/shm has 64 MiB and the collectives of 4 ranks want 130 MiB",
    todo="give the container more: --shm-size=1g",
)


def test_findings_are_wrapped_to_the_terminal_beside_how_grave_they_are() -> None:
    for width in (100, 60, 44):
        lines = paragraph(FINDING, width)
        assert max(map(len, lines)) <= width
        assert lines[0].startswith("warning  shared memory on gpu-1: /dev/shm")
        assert all(line.startswith(" " * 9) for line in lines[1:])
        assert " ".join(" ".join(lines).split()) == f"warning shared memory on gpu-1: {FINDING.found} -> {FINDING.todo}"
    assert any("--shm-size=1g" in line for line in paragraph(FINDING, 44)), "what is to be copied stays whole"


def test_a_finding_that_is_piped_has_a_line_for_what_was_found_and_one_for_what_to_do() -> None:
    assert paragraph(FINDING, UNLIMITED) == [
        f"warning  shared memory on gpu-1: {FINDING.found}",
        f"         -> {FINDING.todo}",
    ]


def test_only_the_checkpoint_is_looked_at_where_that_is_asked_for(tiny_folder: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", str(tiny_folder), "--checkpoint-only", "--json", "--set", "resources.gpus=8"])
    told = json.loads(done.stdout)
    assert done.exit_code == 0, "GPUs that this host lacks are of no interest"
    assert told["facts"] == []
    assert [finding["check"] for finding in told["findings"]] == ["checkpoint"]


def test_a_context_that_is_cut_is_told_of_by_the_doctor_and_by_whoever_serves(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "1M"))
    chunks = {"max_position_embeddings": 1024, "dual_chunk_attention_config": {"original_max_position_embeddings": 256}}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | chunks))
    done = CliRunner().invoke(app, ["doctor", str(folder), "--checkpoint-only", "--json"])
    said = "supports 256 tokens here, not 1024"
    assert [each["check"] for each in json.loads(done.stdout)["findings"] if said in each["found"]] == ["context"]
    find_local_models(ServeConfig(model=ModelSettings(source=str(folder))))
    assert said in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    done = CliRunner().invoke(app, ["doctor", "--ray-address", "127.0.0.1:9"])
    assert done.exit_code == 1
    assert "the Ray cluster at 127.0.0.1:9 could not be joined: its head takes no connection" in done.output


def test_what_the_ranks_need_follows_from_the_configuration(smol_folder: Path) -> None:
    alone = host_requirements(smol_folder, ServeConfig(model=ModelSettings(source=str(smol_folder))))
    half = host_requirements(smol_folder, ServeConfig(parallel=ParallelSettings(tensor=2)))
    assert alone.device == "cpu"
    assert 0.4 * alone.weights_bytes < half.weights_bytes < 0.7 * alone.weights_bytes
    assert host_requirements(None, ServeConfig()) == Need()


@pytest.mark.parametrize(
    ("module", "settings", "heads"),
    [("embed_tokens", {}, 1), ("embed_tokens", {"ensure_weight_tying": True}, 0), ("lm_head", {}, 1), ("layers.0.mlp.up_proj", {}, 0)],
)
def test_a_rank_needs_room_for_a_head_that_an_adapter_unties(
    module: str, settings: dict[str, object], heads: int, smol_folder: Path, tmp_path: Path
) -> None:
    config = ModelConfig.from_checkpoint(smol_folder)
    assert config.tied_embeddings
    name = f"{module}.weight" if module == "lm_head" else f"model.{module}.weight"
    adapter = write_adapter(tmp_path / "lora", {name: torch.zeros(2, 2)}, **settings)
    more = (
        host_requirements(smol_folder, ServeConfig(), adapter).weights_bytes - host_requirements(smol_folder, ServeConfig()).weights_bytes
    )
    assert more == heads * config.vocab_size * config.hidden_size * 2
    with Adapter(adapter) as opened:
        assert opened.unties_head == bool(heads)
    (adapter / ADAPTER_FILE).write_bytes(b"\xff" * 40)
    assert host_requirements(smol_folder, ServeConfig(), adapter) == host_requirements(smol_folder, ServeConfig())


def test_rounded_ranks_need_what_they_hold_rounded(tmp_path: Path) -> None:
    def need_in_gib(quantize: QuantizeName | None, **stored: object) -> float:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS["7B"] | {"num_hidden_layers": 28, "vocab_size": 152_064} | stored))
        return host_requirements(tmp_path, ServeConfig(runner=RunnerConfig(quantize=quantize))).weights_bytes / 2**30

    assert 14 < need_in_gib(None) < 15
    assert 3.9 < need_in_gib("int4") < 4.7
    assert 5 < need_in_gib(None, quantization_config=GPTQ) < 6, "embedding and head are plain"


def test_what_each_rank_read_is_told_and_what_was_read_along() -> None:
    read = LoadStats(kept_bytes=3 * 2**30, fetched_bytes=5 * 2**30, seconds=12.34)
    exact = LoadStats(kept_bytes=2**20, fetched_bytes=2**20, seconds=0.5)
    places = (
        RankPlace(rank=0, host="a", pid=1, read=read),
        RankPlace(rank=1, host="b", pid=2, read=exact),
        RankPlace(rank=2, host="b", pid=3),
    )
    told = loading_lines([ReplicaRecord(id="r", model="m", state=State.READY, address=record("r").address, ranks=places)])
    assert told == [
        "rank 0 on a read 3.00 GiB of weights in 12.3 s, 5.00 GiB fetched",
        "rank 1 on b read 1.0 MiB of weights in 0.5 s",
    ]
