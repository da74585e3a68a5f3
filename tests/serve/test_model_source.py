"""From what an operator writes to a folder, and what is said when that is not possible."""

import errno
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from serve.config import ModelSettings
from serve.model_source import ModelSourceError, find_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> list[tuple[str, dict[str, Any]]]:
    """A hub that has every repository, and what was asked of it."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_folder_is_itself_and_named_by_its_name(checkpoint: Path) -> None:
    found = find_model(ModelSettings(source=str(checkpoint)))
    assert (found.folder, found.name) == (checkpoint, "my-model")
    assert find_model(ModelSettings(source=str(checkpoint), name="other")).name == "other"


def test_a_relative_folder_becomes_absolute(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint)
    found = find_model(ModelSettings(source="."))
    assert (found.folder, found.name) == (checkpoint, "my-model")


@pytest.mark.parametrize("source", ["Qwen/Qwen2-0.5B-Instruct", "hf://Qwen/Qwen2-0.5B-Instruct"])
def test_a_repository_is_fetched_without_pickles_or_code(hub: list[Any], source: str) -> None:
    found = find_model(ModelSettings(source=source, revision="abc"))
    ((repository, options),) = hub
    assert found.name == repository == "Qwen/Qwen2-0.5B-Instruct"
    assert options["revision"] == "abc"
    kept = list(
        huggingface_hub.utils.filter_repo_objects(
            ["model.safetensors", "config.json", "merges.txt", "pytorch_model.bin", "modeling.py", "onnx/model.safetensors", "LICENSE"],
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options["ignore_patterns"],
        )
    )
    assert kept == ["model.safetensors", "config.json", "merges.txt", "LICENSE"]


def test_a_local_folder_wins_over_a_repository_of_the_same_name(
    hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert find_model(ModelSettings(source=f"{tmp_path.name}/my-model")).folder == checkpoint
    assert hub == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("/nowhere/at/all", "there is no folder '/nowhere/at/all';"),
        ("qwen2-7b-instruct", "did you mean Qwen/Qwen2-7B-Instruct?"),
        ("dmeo", "did you mean demo?"),
        (__file__, "is a file; give the folder"),
        ("qwen2", "a repository such as Qwen/Qwen2-0.5B-Instruct"),
        ("hf://Qwen", "write hf://owner/name"),
        ("modelscope://a/b/c", "write modelscope://owner/name"),
        ("hf://../../etc", "does not name a repository"),
    ],
)
def test_what_is_nowhere_is_refused_with_what_would_do(hub: list[Any], source: str, said: str) -> None:
    with pytest.raises(ModelSourceError) as refused:
        find_model(ModelSettings(source=source))
    assert said in str(refused.value)
    assert hub == []


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        find_model(ModelSettings(source=str(tmp_path)))


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real library, sent to a port where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelSourceError, match="could not be reached") as refused:
        find_model(ModelSettings(source="Qwen/Qwen2-0.5B-Instruct"))
    assert "give the folder instead" in str(refused.value)


def test_a_disk_that_takes_no_more_is_not_called_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(repository: str, **options: Any) -> str:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/models/blobs/ab")
        except OSError as error:
            raise RuntimeError("the transfer failed") from error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ModelSourceError, match=r"No space left on device \(/models/blobs/ab\)\. Make room, .* by HF_HOME") as refused:
        find_model(ModelSettings(source="Qwen/Qwen2-0.5B-Instruct"))
    assert "reached" not in str(refused.value)


def test_modelscope_without_its_library_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelSourceError, match="pip install"):
        find_model(ModelSettings(source="modelscope://Qwen/Qwen2-0.5B-Instruct"))


def test_a_folder_in_a_store_keeps_its_weights_there(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    found = find_model(ModelSettings(source=f"file://{checkpoint}/"))
    assert (found.name, found.location) == ("my-model", f"file://{checkpoint}/")
    assert [path.name for path in found.folder.iterdir()] == ["config.json"]
    assert found.folder.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize(("source", "said"), [("memory://nowhere/x", "cannot be listed"), ("x9://a/b", "x9://")])
def test_a_store_without_the_model_is_refused(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelSourceError, match=said):
        find_model(ModelSettings(source=source))
