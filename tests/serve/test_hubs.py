"""A checkpoint fetched by the hub's own client library from a hub on this machine."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from model.checkpoint import Checkpoint
from serve.config import ModelSettings
from serve.model_source import HUB_SCHEME, MODELSCOPE_SCHEME, ModelSourceError, download_if_needed, find_model
from tests.hubs import COMMIT, Hub, hugging_face, model_scope

REPOSITORY, GATED = "Qwen/Tiny", "Qwen/Gated"
UNWANTED = ("pytorch_model.bin", "modeling_qwen2.py", "onnx/model.onnx", "onnx/config.json", "original/model.safetensors", "README.md")
MODULE = "1_Pooling/config.json"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all that else lies in repositories."""
    made = Path(shutil.copytree(tiny_folder, tmp_path_factory.mktemp("hub") / "repository"))
    for name in (*UNWANTED, MODULE):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text("{}")
    return made


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hugging_face(repositories={REPOSITORY: folder, GATED: folder}, revisions=("main", "v1", COMMIT), gated=frozenset({GATED})) as hub:
        use(hub.url, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT, which was read when the library was imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_served_is_fetched_whole_and_nothing_else(hub: Hub, folder: Path) -> None:
    found = find_model(ModelSettings(source=f"{HUB_SCHEME}{REPOSITORY}", revision="v1"))
    assert found.name == REPOSITORY
    wanted = {name: content for name, content in files_in(folder).items() if name not in UNWANTED}
    assert files_in(found.folder) == wanted
    assert MODULE in wanted
    assert any(name.endswith(".safetensors") for name in wanted)
    with Checkpoint(found.folder) as checkpoint, Checkpoint(folder) as oracle:
        assert checkpoint.tensors.keys() == oracle.tensors.keys()
    before = len(hub.fetched)
    assert find_model(ModelSettings(source=REPOSITORY)).folder == found.folder
    assert len(hub.fetched) == before, "what is in the cache is not fetched again"


def test_a_host_that_only_fronts_fetches_no_weights(hub: Hub, folder: Path) -> None:
    brought = download_if_needed(f"{HUB_SCHEME}{REPOSITORY}@{COMMIT}", weights=False)
    assert isinstance(brought, Path)
    assert files_in(brought) == {
        name: content for name, content in files_in(folder).items() if name not in UNWANTED and not name.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("source", "revision", "said"),
    [
        ("Qwen/Nowhere", None, "the hub has no repository Qwen/Nowhere, or it is private"),
        ("Qwen/Qwen2-7B-Instrct", None, r"the hub has no repository Qwen/Qwen2-7B-Instrct \(did you mean Qwen/Qwen2-7B-Instruct\?\), or"),
        ("Other/Qwen2-7B-Instrct", None, "the hub has no repository Other/Qwen2-7B-Instrct, or it is private"),
        (REPOSITORY, "v9", "Qwen/Tiny has no revision 'v9'"),
        (GATED, None, "Qwen/Gated is gated: accept its terms"),
    ],
)
def test_a_refusal_of_the_hub_is_said_with_what_would_do(hub: Hub, source: str, revision: str | None, said: str) -> None:
    with pytest.raises(ModelSourceError, match=said):
        find_model(ModelSettings(source=source, revision=revision))


def test_a_token_opens_what_is_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert find_model(ModelSettings(source=GATED)).name == GATED


def test_who_answers_in_the_hubs_place_is_not_taken_for_it(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall's page, with 200 as such pages have it."""
    with hugging_face(repositories={}) as page:
        page.says_instead = b"<html>You are not online yet</html>"
        use(page.url, monkeypatch)
        with pytest.raises(ModelSourceError, match="could not be reached") as refused:
            find_model(ModelSettings(source=REPOSITORY))
    assert "(JSONDecodeError: " in str(refused.value)


def test_without_the_hub_the_cache_is_enough(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_model(ModelSettings(source=REPOSITORY))
    use("http://127.0.0.1:9", monkeypatch)
    assert find_model(ModelSettings(source=REPOSITORY)).folder == found.folder


@pytest.fixture(scope="module")
def scope(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One for the module: its library reads the environment once."""
    place = tmp_path_factory.mktemp("modelscope")
    with model_scope(repositories={REPOSITORY: folder}, revisions=("master", "v1", "v2")) as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        patch.setenv("MODELSCOPE_CACHE", str(place / "cache"))
        patch.setenv("MODELSCOPE_HOME", str(place / "home"))
        pytest.importorskip("modelscope")
        yield hub


@pytest.mark.parametrize("revision", [None, "v1"])
def test_modelscope_gives_the_same_files(scope: Hub, folder: Path, revision: str | None) -> None:
    found = find_model(ModelSettings(source=f"{MODELSCOPE_SCHEME}{REPOSITORY}", revision=revision))
    assert found.name == REPOSITORY
    wanted = {name: content for name, content in files_in(folder).items() if name not in UNWANTED}
    assert {name: content for name, content in files_in(found.folder).items() if not name.startswith(".")} == wanted
    before = len(scope.fetched)
    assert find_model(ModelSettings(source=f"{MODELSCOPE_SCHEME}{REPOSITORY}", revision=revision)).folder == found.folder
    assert len(scope.fetched) == before


def test_a_front_fetches_no_weights_from_modelscope(scope: Hub) -> None:
    brought = download_if_needed(f"{MODELSCOPE_SCHEME}{REPOSITORY}@v2", weights=False)
    assert isinstance(brought, Path)
    assert (brought / MODULE).exists()
    assert not list(brought.rglob("*.safetensors"))


@pytest.mark.parametrize(("name", "revision"), [("Qwen/Nowhere", None), (REPOSITORY, "v9")])
def test_what_modelscope_has_not_is_told(scope: Hub, name: str, revision: str | None) -> None:
    with pytest.raises(ModelSourceError, match=f"ModelScope has no {name}"):
        find_model(ModelSettings(source=f"{MODELSCOPE_SCHEME}{name}", revision=revision))
