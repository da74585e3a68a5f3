"""Settings: which source wins, what is refused and how it is told, and that every setting is explained."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import EngineConfig
from parallel.topology import Topology
from serve.config import ReplicasSettings, ServeConfig
from serve.config_docs import as_yaml, explain, json_schema, setting_docs
from serve.config_sources import ConfigError, Entry, LoadedConfig, from_assignment, known_settings, load


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    return tmp_path / "manta.yaml"


def problems(file: Path | None = None, environment: dict[str, str] | None = None, flags: list[Entry] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        load(file=file, environment=environment, flags=flags or [])
    return refused.value.problems


def test_flags_win_over_the_environment_and_that_over_the_file(settings_file: Path) -> None:
    settings_file.write_text("http: {port: 1001}\ngrpc: {port: 1002}\nengine: {max_running: 3, max_waiting: 4}\n")
    loaded = load(
        file=settings_file,
        environment={"MANTA_GRPC__PORT": "2002", "MANTA_ENGINE__MAX_RUNNING": "5"},
        flags=[from_assignment("engine.max_running=6")],
    )
    config = loaded.config
    assert (config.http.port, config.grpc.port, config.engine.max_running, config.engine.max_waiting) == (1001, 2002, 6, 4)
    assert loaded.origins == {
        "http.port": "manta.yaml:1",
        "grpc.port": "MANTA_GRPC__PORT",
        "engine.max_running": "--set engine.max_running",
        "engine.max_waiting": "manta.yaml:3",
    }


def test_the_packages_own_dataclasses_come_out() -> None:
    config = load(flags=[from_assignment("parallel.tensor=2"), from_assignment("engine.block_tokens=32")]).config
    assert config.engine == EngineConfig(block_tokens=32)
    assert config.parallel.topology == Topology(tp=2)


def test_a_draft_model_and_speculation_by_one_need_each_other(settings_file: Path) -> None:
    (alone,) = problems(flags=[from_assignment("engine.speculate=draft")])
    assert "there is no runner.draft_model" in alone
    (unused,) = problems(flags=[from_assignment("runner.draft_model=Qwen/Qwen2-0.5B"), from_assignment("engine.speculate=lookup")])
    assert "engine.speculate is lookup; set that to draft" in unused
    first, second = "{model: {name: a}, runner: {draft_model: small}}", "{model: {name: b}, engine: {speculate: lookup}}"
    settings_file.write_text(f"engine: {{speculate: draft}}\nmodels: [{first}, {second}]\n")
    each = load(file=settings_file).config.each_model()
    assert [(one.engine.speculate, one.runner.draft_model) for one in each] == [("draft", "small"), ("lookup", None)]


def test_without_any_source_everything_is_at_its_default() -> None:
    assert load().config == ServeConfig()
    assert load().origins == {}


def test_unknown_settings_are_refused_with_the_nearest_known_one_and_where_they_stand(settings_file: Path) -> None:
    settings_file.write_text("http:\n  prot: 8080\ntensor_parallel: 2\n")
    assert problems(
        settings_file, {"MANTA_ENGIN__BLOCK_TOKENS": "4"}, [from_assignment("max_step_tokens=5"), from_assignment("zork=1")]
    ) == (
        "unknown setting http.prot (manta.yaml:2); did you mean http.port?",
        "unknown setting tensor_parallel (manta.yaml:3); did you mean parallel.tensor?",
        "unknown setting engin.block_tokens (MANTA_ENGIN__BLOCK_TOKENS); did you mean engine.block_tokens?",
        "unknown setting max_step_tokens (--set max_step_tokens); did you mean engine.max_step_tokens?",
        "unknown setting zork (--set zork); `manta config` lists them all",
    )


def test_wrong_keys_and_wrong_values_are_told_at_once(settings_file: Path) -> None:
    settings_file.write_text("engine: {max_step_tokens: 0}\nhttp: {prot: 1}\n")
    told = problems(settings_file, {"MANTA_HTTP__PORT": "abc"}, [from_assignment("runner.dtype=float8")])
    assert len(told) == 4
    assert "engine: max_step_tokens must be at least 1, got 0 (manta.yaml:1)" in told
    assert "http.port should be a valid integer, unable to parse string as an integer, got 'abc' (MANTA_HTTP__PORT)" in told
    assert "runner.dtype should be 'auto', 'bfloat16', 'float16' or 'float32', got 'float8' (--set runner.dtype)" in told


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("http.port=0", "http.port should be greater than or equal to 1"),
        ("http.port=65536", "http.port should be less than or equal to 65535"),
        ("http.port=9000", "http.port and grpc.port are both 9000"),
        ("parallel.tensor=0", "tp must be at least 1"),
        ("parallel.expert=3", "ep=3 does not divide"),
        ("replicas.count=-1", "replicas.count should be greater"),
        ("replicas.count=0", "min=0, count=0, max=0 must be in this order, and max at least 1"),
        ("autoscaling.kv_target=1.5", "kv_target must be above 0 and at most 1"),
        ("runner.kv_memory_fraction=.nan", "runner.kv_memory_fraction should be a finite number"),
        ("limits.body_bytes=-1", "body_bytes must be positive"),
        ("engine.prefix_cache=perhaps", "engine.prefix_cache should be a valid boolean"),
        ("runner.num_real_tokens=5", "unknown setting runner.num_real_tokens"),
        ("model.name=../x y", "model.name String should match pattern"),
    ],
)
def test_values_that_cannot_be_are_refused(assignment: str, said: str) -> None:
    (told,) = problems(flags=[from_assignment(assignment)])
    assert said in told


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("model.revision=1234", "1234"),
        ("model.revision=1e5", "1e5"),
        ("model.revision=null", None),
        ("runner.num_threads=", None),
        ("runner.num_threads=4", 4),
        ("engine.prefix_cache=no", False),
        ("router.ping_s=0.5", 0.5),
        ("model.source=a=b", "a=b"),
    ],
)
def test_text_becomes_what_the_setting_is(assignment: str, value: Any) -> None:
    section, name = assignment.split("=")[0].split(".")
    assert getattr(getattr(load(flags=[from_assignment(assignment)]).config, section), name) == value


def test_an_assignment_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"section\.field=value"):
        from_assignment("http.port")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http: {port: 1}\nhttp: {port: 2}\n", "http is there twice (manta.yaml:1 and manta.yaml:2)"),
        ("http:\n  port: 1\n  port: 2\n", "port is there twice (manta.yaml:2 and manta.yaml:3)"),
        ("- http\n", "the whole file must be a mapping"),
        ("http: 8000\n", "http must be a mapping"),
        ("http: [", "is not YAML"),
        ("http: {port: !!python/object/apply:os.system [ls]}", "is not YAML"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(settings_file: Path, text: str, said: str) -> None:
    settings_file.write_text(text)
    (told,) = problems(settings_file)
    assert said in told


def test_a_missing_file_is_refused(settings_file: Path) -> None:
    assert "No such file" in problems(settings_file)[0]


def test_empty_files_and_empty_sections_change_nothing(settings_file: Path) -> None:
    settings_file.write_text("# nothing yet\n")
    assert load(file=settings_file).config == ServeConfig()
    settings_file.write_text("http:\n  # port: 1\nengine:\n")
    assert load(file=settings_file).config == ServeConfig()


def test_what_kubernetes_puts_into_the_environment_is_no_setting() -> None:
    made = {"MANTA_PORT": "tcp://10.0.0.1:8000", "MANTA_SERVICE_HOST": "10.0.0.1", "MANTA_PORT_8000_TCP_PROTO": "tcp", "MANTA_CACHE": "/c"}
    assert load(environment=made).config == ServeConfig()


def test_a_config_is_frozen_and_crosses_processes() -> None:
    config = load(flags=[from_assignment("parallel.tensor=3")]).config
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValueError, match="frozen"):
        config.http.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("said", "least", "initial", "most"),
    [
        ({}, 1, 1, 1),
        ({"count": 3}, 3, 3, 3),
        ({"min": 0, "max": 2}, 0, 0, 2),
        ({"min": 1, "max": 4, "count": 2}, 1, 2, 4),
        ({"max": 3}, 1, 1, 3),
    ],
)
def test_what_is_not_said_of_the_number_of_replicas_follows_from_what_is(said: dict[str, int], least: int, initial: int, most: int) -> None:
    replicas = ServeConfig.model_validate({"replicas": said}).replicas
    assert (replicas.least, replicas.initial, replicas.most) == (least, initial, most)
    assert replicas.vary == (least != most)


def test_while_an_upgrade_replaces_them_there_may_be_more_replicas() -> None:
    assert ReplicasSettings(count=5).most_at_once == 5
    assert ReplicasSettings(count=5, max_surge_percent=25).most_at_once == 7


@pytest.mark.parametrize("said", [{"count": 1, "max": 0}, {"min": 2, "count": 1}, {"count": 5, "max": 4}])
def test_numbers_of_replicas_that_contradict_each_other_are_refused(said: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="replicas"):
        ServeConfig.model_validate({"replicas": said})


TWO_MODELS = """
engine: {max_running: 7}
models:
- model: {source: demo, name: small}
  engine: {max_waiting: 3}
- model: {source: Qwen/Qwen2-7B-Instruct}
  parallel: {tensor: 2}
  engine: {max_running: 9}
"""


def test_an_entry_of_the_list_overrides_single_settings_of_those_beside_it(settings_file: Path) -> None:
    settings_file.write_text(TWO_MODELS)
    loaded = load(
        file=settings_file,
        environment={"MANTA_MODELS__1__ENGINE__MAX_STEP_TOKENS": "99"},
        flags=[from_assignment("engine.block_tokens=32"), from_assignment("models.1.model.revision=1e5")],
    )
    small, large = loaded.config.each_model()
    assert small.engine == EngineConfig(max_running=7, max_waiting=3, block_tokens=32)
    assert large.engine == EngineConfig(max_running=9, max_step_tokens=99, block_tokens=32)
    assert (small.parallel.tensor, large.parallel.tensor) == (1, 2)
    assert (small.model.name, large.model.source, large.model.revision) == ("small", "Qwen/Qwen2-7B-Instruct", "1e5")
    assert small.models == large.models == ()
    assert loaded.origins["models.0.engine.max_waiting"] == "manta.yaml:5"
    assert loaded.origins["models.1.engine.max_step_tokens"] == "MANTA_MODELS__1__ENGINE__MAX_STEP_TOKENS"


def test_without_a_list_the_sections_are_those_of_the_only_model() -> None:
    config = load(flags=[from_assignment("model.source=demo")]).config
    assert config.each_model() == (config,)


def test_settings_with_a_list_can_be_printed_and_sent_and_read_again(settings_file: Path) -> None:
    settings_file.write_text(TWO_MODELS)
    loaded = load(file=settings_file)
    assert pickle.loads(pickle.dumps(loaded.config)) == loaded.config
    assert ServeConfig.model_validate(loaded.config.model_dump(mode="json")) == loaded.config
    printed = as_yaml(loaded)
    assert "max_waiting: 3  # from manta.yaml:5" in printed
    settings_file.write_text(printed)
    assert load(file=settings_file).config == loaded.config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: 3", "models must be a list"),
        ("models: {model: {name: a}}", "models must be a list"),
        ("models:\n- 3", "each entry of models must be a mapping"),
        ("models:\n- http: {port: 1}", "unknown setting models.0.http.port (manta.yaml:2); did you mean http.port?"),
        (
            "models:\n- engine: {max_runing: 1}",
            "unknown setting models.0.engine.max_runing (manta.yaml:2); did you mean engine.max_running?",
        ),
        ("models:\n- engine: {max_running: x}", "models.0.engine.max_running should be a valid integer"),
        ("models:\n- engine: {max_running: 0}", "models.0.engine: max_running must be at least 1, got 0 (manta.yaml:2)"),
        ("engine: {max_running: 0}\nmodels:\n- model: {name: a}", "engine: max_running must be at least 1, got 0 (manta.yaml:1)"),
        ("models:\n- model: {name: a}\n- model: {name: a}", "two models are called 'a'"),
        ("model: {name: z}\nmodels:\n- model: {name: a}", "each entry has its own section model"),
    ],
)
def test_what_is_wrong_in_the_list_is_told_once_and_with_its_place(settings_file: Path, text: str, said: str) -> None:
    settings_file.write_text(text)
    (told,) = problems(settings_file)
    assert said in told


def test_an_entry_that_comes_after_none_is_refused() -> None:
    (told,) = problems(flags=[from_assignment("models.1.model.name=a")])
    assert "there is no entry models.0 before it" in told


def test_the_printed_settings_are_a_file_that_gives_the_same_settings(settings_file: Path) -> None:
    loaded = load(flags=[from_assignment("model.name=my-model"), from_assignment("runner.kv_cache_bytes=1000000")])
    printed = as_yaml(loaded)
    settings_file.write_text(printed)
    assert load(file=settings_file).config == loaded.config
    assert 'name: "my-model"  # from --set model.name' in printed
    assert "# Tokens per KV block." in printed


def test_every_setting_is_printed_and_most_are_explained() -> None:
    tree = yaml.safe_load(as_yaml(load()))
    assert tree.pop("models") == []
    assert {f"{section}.{name}" for section, fields in tree.items() for name in fields} == set(known_settings())
    ours = ("model.", "parallel.", "replicas.", "http.", "grpc.", "logging.", "ray.")
    assert [path for path, doc in setting_docs().items() if path.startswith(ours) and not doc.doc] == []


def test_one_setting_is_explained_with_every_way_to_set_it() -> None:
    text = explain("engine.max_step_tokens", LoadedConfig(config=ServeConfig(), origins={}))
    assert "Maximum tokens computed per step" in text
    for way in ("MANTA_ENGINE__MAX_STEP_TOKENS=2048", "--set engine.max_step_tokens=2048", "engine: {max_step_tokens: 2048}", "(default)"):
        assert way in text
    with pytest.raises(ConfigError, match=r"did you mean engine.max_step_tokens\?"):
        explain("engine.max_step_token", load())


def test_the_schema_forbids_what_is_unknown_and_has_no_derived_fields() -> None:
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["EngineConfig"]["additionalProperties"] is False
    assert "num_real_tokens" not in schema["$defs"]["RunnerConfig"]["properties"]
    assert schema["$defs"]["HttpSettings"]["properties"]["port"]["maximum"] == 65535
    json.dumps(schema)
