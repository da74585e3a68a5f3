"""A model with an adapter, as an operator asks for it: found, named, looked over, with the texts that it was trained with."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from model.adapter_config import AdapterError
from model.adapter_files import files_with_adapter
from model.config import ModelConfig
from model.generation_config import GenerationDefaults
from model.pooling import PoolingConfig
from parallel.topology import Topology
from serve.app import portable_adapter
from serve.cli import app
from serve.commands.resolve_models import models_for_cluster
from serve.config import ModelEntry, ModelSettings, ServeConfig
from serve.grpc.responses import model_message
from serve.http.models import model_object
from serve.model_check import UnusableCheckpoint, adapter_base_warning, check_model
from serve.model_facts import ModelFacts
from serve.model_source import ModelSourceError, find_model, served_name, source_name
from serve.text.chat_template import stored_source
from serve.text.tokenizer import Tokenizer
from tests.model.adapters import low_rank, write_adapter

BASE = "Qwen/Qwen2-7B"


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig.from_checkpoint(tiny_folder)
    tensors = low_rank("model.layers.0.self_attn.o_proj", config.hidden_size, config.num_heads * config.head_dim)
    return write_adapter(tmp_path_factory.mktemp("adapters") / "my-lora", tensors, base_model_name_or_path=BASE)


def test_a_model_is_called_as_its_adapter_is(tiny_folder: Path, adapter: Path) -> None:
    found = find_model(ModelSettings(source=str(tiny_folder), adapter=str(adapter)))
    assert (found.location, found.adapter, found.name) == (tiny_folder, adapter, "my-lora")
    assert find_model(ModelSettings(source=str(tiny_folder), adapter=str(adapter), name="support")).name == "support"
    assert served_name(ModelSettings(source=BASE, adapter="me/my-lora")) == "me/my-lora"
    assert served_name(ModelSettings(source=BASE, adapter=str(adapter))) == "my-lora"
    assert portable_adapter(ModelSettings(source=BASE, adapter="me/my-lora", adapter_revision="v2")) == "hf://me/my-lora@v2"


def test_an_adapter_is_fetched_from_a_hub_as_a_model_is(tiny_folder: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options["revision"]))
        return str(adapter)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = find_model(ModelSettings(source=str(tiny_folder), adapter="me/my-lora", adapter_revision="v2"))
    assert (found.adapter, found.name, asked) == (adapter, "me/my-lora", [("me/my-lora", "v2")])
    with pytest.raises(ModelSourceError, match=f"it is a LoRA adapter; serve it with its base: manta serve {BASE} --adapter me/my-lora"):
        find_model(ModelSettings(source="me/my-lora"))


@pytest.mark.parametrize(
    ("source", "added", "reason"),
    [
        ("TINY", "/nowhere/lora", r"adapter: there is no folder '/nowhere/lora'; give the folder that PEFT saved"),
        ("TINY", "sql=/nowhere/lora", r"the name is a setting of its own: --name sql --adapter /nowhere/lora"),
        ("TINY", "TINY", r"is no adapter folder: it has no adapter_config\.json"),
        ("LORA", None, rf"but it is a LoRA adapter; serve it with its base: manta serve {BASE} --adapter .*my-lora"),
    ],
)
def test_what_is_no_adapter_or_no_model_is_answered_with_what_would_do(
    source: str, added: str | None, reason: str, tiny_folder: Path, adapter: Path
) -> None:
    folders = {"TINY": str(tiny_folder), "LORA": str(adapter)}
    with pytest.raises(ModelSourceError, match=reason):
        find_model(ModelSettings(source=folders[source], adapter=added and folders.get(added, added)))


def test_several_models_may_have_a_base_in_common() -> None:
    entries = [ModelEntry(model=ModelSettings(source=BASE, adapter=adapter)) for adapter in (None, "me/one", "me/other")]
    assert [each.model.adapter for each in ServeConfig(models=tuple(entries)).each_model()] == [None, "me/one", "me/other"]
    with pytest.raises(ValidationError, match="two models are called 'me/one'"):
        ServeConfig(models=(entries[1], entries[1]))
    with pytest.raises(ValidationError, match="adapter_revision is set, but there is no adapter"):
        ModelSettings(source=BASE, adapter_revision="v2")


def test_an_adapter_is_looked_over_with_its_model(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    check_model(tiny_folder, Topology(), adapter)
    other = write_adapter(tmp_path / "other", low_rank("model.layers.77.mlp.up_proj", 8, 8))
    with pytest.raises(UnusableCheckpoint, match="2 of its tensors do not exist there"):
        check_model(tiny_folder, Topology(), other)


def test_doctor_tells_of_an_adapter_of_another_base_and_serving_on_a_cluster_mentions_it(
    tiny_folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = CliRunner().invoke(app, ["doctor", str(tiny_folder), "--adapter", str(adapter), "--checkpoint-only", "--json"])
    assert [(each["severity"], each["check"]) for each in json.loads(done.stdout)["findings"]] == [
        ("note", "checkpoint"),
        ("warning", "adapter"),
    ]
    (model,) = models_for_cluster(ServeConfig(model=ModelSettings(source=str(tiny_folder), adapter=str(adapter))))
    assert (model.location, model.adapter, model.name) == (tiny_folder, adapter, "my-lora")
    assert f"says that it was trained on {BASE}" in capsys.readouterr().err


STEERS = "me/base; \x1b[2Jrm -rf ~ #" + "a" * 500


def test_what_an_adapter_calls_its_base_steers_no_terminal_and_is_no_part_of_a_command(tiny_folder: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "lora", low_rank("model.layers.77.mlp.up_proj", 8, 8), base_model_name_or_path=STEERS)
    with pytest.raises(UnusableCheckpoint, match="says that it was trained on me/base") as misfit:
        check_model(tiny_folder, Topology(), other)
    with pytest.raises(ModelSourceError, match="manta serve BASE --adapter") as no_model:
        find_model(ModelSettings(source=str(other)))
    doubt = adapter_base_warning(other, BASE)
    assert doubt is not None
    for said in (str(misfit.value), str(no_model.value), doubt):
        assert said.isprintable()
        assert "a" * 200 not in said
    assert "manta serve me/base" not in str(no_model.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [(BASE, BASE), ("hf://me/lora", "me/lora"), ("s3://bucket/a/lora/", "lora"), ("/a/b/lora", "lora"), ("./lora", "lora")],
)
def test_what_a_source_names_has_a_name_without_being_looked_at(source: str, name: str) -> None:
    assert source_name(source) == name


def test_models_are_listed_with_what_they_are_made_of(tiny_folder: Path) -> None:
    facts = ModelFacts.from_checkpoint(
        tiny_folder, name="support", tokenizer=Tokenizer.from_folder(tiny_folder), base="Qwen/Qwen2-7B", adapter="my-lora"
    )
    told = model_object(facts)
    assert (told["id"], told["root"], told["parent"]) == ("support", "my-lora", "Qwen/Qwen2-7B")
    message = model_message(facts)
    assert (message.id, message.root, message.parent) == ("support", "my-lora", "Qwen/Qwen2-7B")


class TestTexts:
    """Tokenizer, template and ends of a model with an adapter."""

    def test_an_adapter_that_brings_none_leaves_the_bases(self, smol_folder: Path, adapter: Path) -> None:
        assert files_with_adapter(smol_folder, None) == files_with_adapter(smol_folder, adapter) == smol_folder

    def test_a_template_alone_is_taken(self, smol_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}!")
        folder = files_with_adapter(smol_folder, tmp_path)
        assert stored_source(folder) == "{{ messages }}!"
        assert (folder / "tokenizer.json").read_bytes() == (smol_folder / "tokenizer.json").read_bytes()
        assert (folder / "config.json").read_bytes() == (smol_folder / "config.json").read_bytes()
        assert files_with_adapter(smol_folder, tmp_path) == folder
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}?")
        assert stored_source(files_with_adapter(smol_folder, tmp_path)) == "{{ messages }}?"

    def test_a_tokenizer_is_taken_whole_with_the_bases_template_and_its_own_end(
        self, smol_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
        base = Path(shutil.copytree(smol_folder, tmp_path / "base"))
        (base / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}."}))
        tokenizer = json.loads((base / "tokenizer.json").read_text())
        end = max(token["id"] for token in tokenizer["added_tokens"])
        text = next(token["content"] for token in tokenizer["added_tokens"] if token["id"] == end)
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.5}))
        trained = tmp_path / "trained"
        trained.mkdir()
        shutil.copy(base / "tokenizer.json", trained)
        without = {name: value for name, value in settings.items() if name != "chat_template"}
        (trained / "tokenizer_config.json").write_text(json.dumps(without | {"eos_token": {"content": text}}))
        folder = files_with_adapter(base, trained)
        assert stored_source(folder) == "{{ messages }}."
        assert Tokenizer.from_folder(folder).eos_id == end
        defaults = GenerationDefaults.from_checkpoint(folder, ModelConfig.from_checkpoint(folder))
        assert (defaults.eos_token_ids, defaults.temperature) == ((0, end), 0.5)
        (trained / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}!"}))
        (base / "chat_template.jinja").write_text("{{ messages }}?")
        assert stored_source(files_with_adapter(base, trained)) == "{{ messages }}!"
        (trained / "tokenizer_config.json").unlink()
        folder = files_with_adapter(base, trained)
        assert stored_source(folder) == "{{ messages }}?"
        assert Tokenizer.from_folder(folder).named == Tokenizer.from_folder(base).named

    def test_an_embedding_models_own_parts_stay_beside_the_adapters_tokenizer(
        self, smol_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
        base = Path(shutil.copytree(smol_folder, tmp_path / "base"))
        (base / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]))
        for folder in ("1_Pooling", "onnx"):
            (base / folder).mkdir()
            (base / folder / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
        trained = tmp_path / "trained"
        trained.mkdir()
        shutil.copy(base / "tokenizer.json", trained)
        adapted = files_with_adapter(base, trained)
        assert adapted != base
        assert PoolingConfig.from_checkpoint(adapted) == PoolingConfig(kind="last", normalise=False)
        assert not (adapted / "onnx").exists()


class TestSlowTokenizer:
    """An adapter's tokenizer without tokenizer.json."""

    @pytest.fixture
    def base(self, smol_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
        base = Path(shutil.copytree(smol_folder, tmp_path / "base"))
        (base / "chat_template.jinja").write_text("{{ messages }}.")
        (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
        return base

    @pytest.fixture
    def end(self, base: Path) -> tuple[str, int]:
        """An added token that does not end the base's answers."""
        added = json.loads((base / "tokenizer.json").read_text())["added_tokens"]
        return max(((token["content"], token["id"]) for token in added), key=lambda token: token[1])

    @pytest.fixture
    def trained(self, base: Path, end: tuple[str, int], tmp_path: Path) -> Path:
        folder = tmp_path / "trained"
        folder.mkdir()
        settings = {"eos_token": end[0], "chat_template": "{{ messages }}!", "added_tokens_decoder": {str(end[1]): {"content": end[0]}}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "vocab.json").write_text(json.dumps(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]))
        (folder / "merges.txt").write_text("")
        return folder

    def test_that_is_the_bases_has_its_own_template_and_end(self, base: Path, trained: Path, end: tuple[str, int]) -> None:
        folder = files_with_adapter(base, trained)
        assert stored_source(folder) == "{{ messages }}!", "the base's chat_template.jinja must not hide it"
        assert Tokenizer.from_folder(folder).eos_id == end[1]
        assert GenerationDefaults.from_checkpoint(folder, ModelConfig.from_checkpoint(folder)).eos_token_ids == (0, end[1])
        assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

    def test_that_says_nothing_new_leaves_the_bases(self, base: Path, trained: Path) -> None:
        (trained / "tokenizer_config.json").write_text("{}")
        assert files_with_adapter(base, trained) == base

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("added_tokens.json", {"<tool>": 7}),
            ("vocab.json", {"a token that no tokenizer has": 7}),
            ("tokenizer_config.json", {"added_tokens_decoder": {"7": {"content": "<tool>"}}}),
            ("tokenizer_config.json", {"eos_token": {"content": "<end>"}}),
        ],
    )
    def test_with_other_tokens_is_refused_with_what_would_do(self, file: str, content: Any, base: Path, trained: Path) -> None:
        (trained / file).write_text(json.dumps(content))
        with pytest.raises(AdapterError, match=r"is missing or has another id in the base's, but no tokenizer\.json; save it as"):
            files_with_adapter(base, trained)

    def test_whose_token_is_elsewhere_is_refused(self, base: Path, trained: Path, end: tuple[str, int]) -> None:
        (trained / "added_tokens.json").write_text(json.dumps({end[0]: end[1] - 1}))
        with pytest.raises(AdapterError, match="has another id"):
            files_with_adapter(base, trained)
