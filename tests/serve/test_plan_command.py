"""`manta plan`, as it is typed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner

from engine.run.settings import DtypeName
from parallel.topology import Topology
from serve.cli import app
from serve.commands.plan import parse_tokens
from serve.config_sources import load
from serve.planning.errors import PlanError
from tests.serve.planning.plan_inputs import CONFIGS

HEAVY = ("torch", "ray", "fastapi", "grpc", "tokenizers", "transformers")
"""Not pydantic: typer imports it by itself."""


def manta(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, result.output


def test_the_best_layouts_come_with_memory_floors_and_reasons() -> None:
    code, output = manta("Qwen2-57B-A14B", "--gpus", "8xH100-80G", "--context", "32k", "--concurrency", "64")
    assert code == 0
    for expected in (
        "64 sequences of 32,768 tokens", "tp 4 x dp 2 x ep 8", "GiB/rank", "tokens/s", "64 of 64", "Ranked by", "106.9 GiB for weights",
    ):  # fmt: skip
        assert expected in output
    assert "`manta serve` takes" not in output, "the first of them can be served: nothing need be said"


def test_without_a_known_gpu_no_speed_is_told() -> None:
    code, output = manta("Qwen2-7B", "--gpus", "2x48G")
    assert code == 0
    assert "tokens/s\n" not in output
    assert "at most" not in output


def test_all_lists_every_layout_and_every_refusal() -> None:
    _, short = manta("Qwen2-57B-A14B", "--gpus", "8xH100-80G")
    _, long = manta("Qwen2-57B-A14B", "--gpus", "8xH100-80G", "--all")
    assert len(long.splitlines()) > 3 * len(short.splitlines())
    assert long.count("does not divide") == 22


def test_json_has_every_rank_and_every_reason() -> None:
    code, output = manta("Qwen2-72B", "--gpus", "8xA100-40G", "--hosts", "2", "--quantize", "int4", "--json")
    made = json.loads(output)
    assert code == 0
    assert (made["gpus_per_host"], made["hosts"], made["format"], made["dtype"]) == (8, 2, "int4", "auto")
    for layout in made["layouts"]:
        assert len(layout["ranks"]) == layout["tp"] * layout["pp"] * layout["dp"]
        assert layout["floors"]["tokens_per_s"] > 0
        assert layout["served_today"] == (not layout["limits_today"])
    assert {"tp", "pp", "dp", "ep", "reason", "sentence"} == set(made["invalid"][0])


@pytest.mark.parametrize(
    ("flags", "format", "dtype"),
    [
        ((), "bfloat16", "bfloat16"),
        (("--dtype", "auto"), "bfloat16", "bfloat16"),
        (("--dtype", "bfloat16"), "bfloat16", "bfloat16"),
        (("--dtype", "float16"), "float16", "float16"),
        (("--dtype", "float16", "--quantize", "int8"), "int8", "float16"),
        (("--quantize", "fp8"), "fp8", "bfloat16"),
    ],
)
def test_dtype_and_format_have_the_names_of_manta_serve_and_are_emitted_so(flags: tuple[str, ...], format: str, dtype: str) -> None:
    question = ("Qwen2-7B", "--gpus", "2xH100-80G", *flags)
    assert json.loads(manta(*question, "--json")[1])["format"] == format
    runner = yaml.safe_load(manta(*question, "--emit", "config")[1])["runner"]
    assert (runner["dtype"], runner.get("quantize", format)) == (dtype, format)


def test_float16_takes_the_memory_of_bfloat16() -> None:
    plain, half = (json.loads(manta("Qwen2-7B", "--gpus", "2xL4", "--json", "--dtype", name)[1]) for name in ("bfloat16", "float16"))
    assert plain["layouts"] == half["layouts"]


def test_float32_is_not_planned_and_an_unknown_dtype_is_answered_with_those_that_exist() -> None:
    code, output = manta("Qwen2-7B", "--gpus", "2xL4", "--dtype", "float32")
    assert code == 2
    assert "float32 is not planned" in output
    code, output = manta("Qwen2-7B", "--gpus", "2xL4", "--dtype", "bf16")
    assert code == 2
    assert all(name in output for name in get_args(DtypeName))


def test_a_draft_model_takes_its_weights_and_keys_and_values_on_the_ranks_that_sample() -> None:
    question = ("Qwen2-72B", "--gpus", "4xH100-80G", "--json")
    plain, drafting = (json.loads(manta(*question, *more)[1]) for more in ((), ("--draft-model", "Qwen2-0.5B")))
    assert drafting["draft_model"] == "Qwen/Qwen2-0.5B"
    before, after = ({(one["tp"], one["pp"]): one for one in made["layouts"]} for made in (plain, drafting))
    ranks = after[2, 2]["ranks"]
    assert [rank["draft_bytes"] > 0.9e9 for rank in ranks] == [False, False, True, False]
    assert [rank["draft_kv_bytes_per_token"] for rank in ranks] == [0, 0, 2 * 24 * 2 * 64 * 2, 0]
    assert 0.7 * before[2, 2]["kv_tokens"] < after[2, 2]["kv_tokens"] < before[2, 2]["kv_tokens"]


def test_where_nothing_fits_the_reasons_are_told_and_the_code_is_1() -> None:
    code, output = manta("Qwen2-72B", "--gpus", "2x24G")
    assert code == 1
    assert "No layout is valid" in output
    assert "use more ranks" in output


def test_emitted_settings_are_the_best_that_is_served_and_load(tmp_path: Path) -> None:
    code, output = manta("Qwen2-57B-A14B", "--gpus", "8xH100-80G", "--emit", "config")
    assert code == 0
    assert "NOT SERVED" not in output
    (tmp_path / "manta.yaml").write_text(output)
    _, listed = manta("Qwen2-57B-A14B", "--gpus", "8xH100-80G", "--json")
    best = next(layout for layout in json.loads(listed)["layouts"] if layout["served_today"])
    written = load(file=tmp_path / "manta.yaml").config
    assert written.parallel.topology == Topology(**{axis: best[axis] for axis in ("tp", "pp", "dp", "ep")})
    assert written.replicas.count == best["replicas"]


def test_emitted_settings_name_the_draft_model() -> None:
    tree = yaml.safe_load(manta("Qwen2-7B", "--gpus", "2x48G", "--draft-model", "Qwen2-0.5B", "--emit", "config")[1])
    assert (tree["engine"]["speculate"], tree["runner"]["draft_model"]) == ("draft", "Qwen/Qwen2-0.5B")


def test_a_layout_can_be_chosen_by_its_number() -> None:
    _, output = manta("Qwen2-57B-A14B", "--gpus", "8xH100-80G", "--emit", "helm", "--layout", "1")
    assert "data: 2" in output
    code, output = manta("Qwen2-57B-A14B", "--gpus", "8xH100-80G", "--emit", "helm", "--layout", "9999")
    assert code == 2
    assert "no number 9999" in output


def test_nothing_is_emitted_that_could_not_be_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["7B"] | {"quantization_config": {"quant_method": "fp8"}}))
    code, output = manta(str(tmp_path), "--gpus", "8xA100-80G", "--emit", "config")
    assert code == 1
    assert "checkpoints that are stored in FP8 are planned only" in output


def test_a_checkpoint_that_is_stored_quantised_is_served_without_a_word_about_it() -> None:
    code, output = manta(
        "Qwen2-72B-Instruct-GPTQ-Int4", "--gpus", "1xH100-80G", "--context", "8k", "--concurrency", "8", "--emit", "config"
    )
    assert code == 0
    assert "quantize:" not in output
    assert "dtype: auto" in output


def test_a_checkpoint_folder_is_planned_from_its_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["7B"]))
    code, output = manta(str(tmp_path), "--gpus", "2xL4")
    assert code == 0
    assert "32,768 tokens" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a model and GPUs"),
        (("Qwen2-7B",), "give a model and GPUs"),
        (("Qwen2-9B", "--gpus", "8xH100"), "Qwen2-57B-A14B"),
        (("Qwen2-7B", "--gpus", "8xH1000"), "H100-80G"),
        (("Qwen2-7B", "--gpus", "8xH100", "--context", "long"), "not a number of tokens"),
        (("Qwen2-7B-Instruct", "--gpus", "8xH100", "--context", "128k"), "rope_scaling"),
    ],
)
def test_a_question_that_cannot_be_answered_is_answered_with_one_that_can(arguments: tuple[str, ...], said: str) -> None:
    code, output = manta(*arguments)
    assert code == 2
    assert said in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("text", "tokens"), [("32k", 32_768), ("8192", 8192), ("1M", 1_048_576)])
def test_tokens_are_counted_in_1024(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "1.5k", "", "k"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        parse_tokens(text)


@pytest.mark.parametrize("arguments", [["--help"], ["Qwen2-57B-A14B", "--gpus", "8xH100-80G"]], ids=["help", "planning"])
def test_planning_imports_nothing_that_takes_seconds(arguments: list[str]) -> None:
    program = f"""
import sys
from parallel.topology import Topology
from serve.cli import app
try:
    app(["plan", *{arguments!r}])
except SystemExit:
    pass
print(sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "[]"
