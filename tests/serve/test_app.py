"""The application builder of Serve config files, and the files that are written for it. Nothing is started."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve.app import app
from serve.config_sources import ConfigError, from_assignment, from_tree, load, merge_entries
from serve.ray_serve_config import ray_serve_config, ray_serve_config_yaml


def test_args_are_checked_as_the_settings_of_manta_serve_are() -> None:
    with pytest.raises(ConfigError) as refused:
        app({"parallel": {"tensor": 0}, "engin": {"block_tokens": 4}, "tensor_parallel": 2})
    assert refused.value.problems == (
        "unknown setting engin.block_tokens (args.engin.block_tokens); did you mean engine.block_tokens?",
        "unknown setting tensor_parallel (args.tensor_parallel); did you mean parallel.tensor?",
        "parallel: tp must be at least 1, got 0 (args.parallel.tensor)",
    )


def test_a_section_must_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match=r"args.http must be a mapping of names to values"):
        app({"http": 8000})


def test_args_may_also_be_words_of_a_command_line() -> None:
    entries = from_tree({"parallel.tensor": "2", "model": {"name": "a"}, "engine.prefix_cache": False}, "args")
    assert {entry.path: entry.value for entry in entries} == {"parallel.tensor": 2, "model.name": "a", "engine.prefix_cache": False}


def test_the_written_file_is_one_of_ray_serves_and_its_args_give_the_same_settings() -> None:
    wanted = ("model.source=Qwen/Qwen2-7B-Instruct", "parallel.tensor=2", "http.port=8123", "grpc.port=9123", "ray.address=auto")
    loaded = load(flags=[from_assignment(text) for text in (*wanted, "runner.kv_cache_bytes=4096")])
    tree = yaml.safe_load(ray_serve_config_yaml(loaded, name="talker"))
    ServeDeploySchema.model_validate(tree)
    assert tree == ray_serve_config(loaded, name="talker")
    assert (tree["http_options"], tree["grpc_options"]["port"]) == ({"host": "127.0.0.1", "port": 8123}, 9123)
    (application,) = tree["applications"]
    assert application["args"] == {
        "model": {"source": "Qwen/Qwen2-7B-Instruct"},
        "parallel": {"tensor": 2},
        "runner": {"kv_cache_bytes": 4096},
    }
    assert [deployment["name"] for deployment in deployments(application["args"])] == [
        "EngineDeployment-Qwen-Qwen2-7B-Instruct-9ddf52",
        "FrontDeployment",
    ]


def test_several_models_are_written_and_read_as_a_list() -> None:
    flags = ("runner.dtype=float32", "models.0.model.source=demo", "models.1.model.source=a/b", "models.1.parallel.tensor=2")
    loaded = load(flags=[from_assignment(text) for text in flags])
    args = ray_serve_config(loaded, name="both")["applications"][0]["args"]
    assert args == {
        "runner": {"dtype": "float32"},
        "models": [{"model": {"source": "demo"}}, {"model": {"source": "a/b"}, "parallel": {"tensor": 2}}],
    }
    assert merge_entries(from_tree(args, "args")).config == loaded.config
    with pytest.raises(ConfigError, match=r"unknown setting models.0.modle.source \(args.models.0.modle.source\)"):
        app({"models": [{"modle": {"source": "demo"}}]})


def deployments(args: dict) -> list[dict]:
    from ray.serve._private.build_app import build_app

    return sorted(({"name": each.name} for each in build_app(app(args), name="x").deployments), key=lambda each: each["name"])


def test_serve_build_takes_the_application_of_the_environment(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    command = [str(Path(sys.executable).parent / "serve"), "build", "serve.app:from_environment", "--app-dir", root, "-o", "serve.yaml"]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MANTA_REPLICAS__COUNT": "3", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (application,) = yaml.safe_load((tmp_path / "serve.yaml").read_text())["applications"]
    counts = {deployment["name"]: deployment.get("num_replicas") for deployment in application["deployments"]}
    assert counts["EngineDeployment-demo"] == 3
