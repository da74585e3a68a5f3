"""Damaged checkpoints: each is refused at once, by what an operator runs, with the file (and tensor) named, and nothing is allocated."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.run.settings import RunnerConfig
from engine.run.start import start_rank
from model.checkpoint import INDEX_FILE, write_checkpoint
from parallel.groups import ParallelGroups
from parallel.topology import Topology
from serve.model_check import UnusableCheckpoint, check_model
from tests.ranks import run_ranks

K_BIAS = "model.layers.0.self_attn.k_proj.bias"
NORM = "model.norm.weight"


SHAPES = {
    "model.embed_tokens.weight": (640, 8), NORM: (8,),
    "model.layers.0.self_attn.q_proj.weight": (8, 8), "model.layers.0.self_attn.q_proj.bias": (8,),
    "model.layers.0.self_attn.k_proj.weight": (4, 8), K_BIAS: (4,),
    "model.layers.0.self_attn.v_proj.weight": (4, 8), "model.layers.0.self_attn.v_proj.bias": (4,),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (16, 8), "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.layers.0.input_layernorm.weight": (8,), "model.layers.0.post_attention_layernorm.weight": (8,),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(smol_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint in several shards, with a tokenizer."""
    folder = Path(shutil.copytree(smol_folder, tmp_path_factory.mktemp("whole") / "model"))
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    write_checkpoint(folder, tensors, json.loads((folder / "config.json").read_text()), max_shard_bytes=600)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX_FILE).read_text())
    return index


def file_of(folder: Path, tensor: str) -> Path:
    return folder / index_of(folder)["weight_map"][tensor]


def a_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def set_header(path: Path, header: bytes) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def edit_header(folder: Path, tensor: str, **fields: Any) -> None:
    path = file_of(folder, tensor)
    header = header_of(path)
    header[tensor] |= fields
    set_header(path, json.dumps(header).encode())


def edit_index(folder: Path, tensor: str, file: object) -> None:
    index = index_of(folder)
    index["weight_map"][tensor] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))


def edit_tensors(folder: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """In its file, without a word to the index."""
    path = file_of(folder, tensor)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def repeat_name(folder: Path) -> None:
    path = file_of(folder, NORM)
    encoded = json.dumps(header_of(path))
    set_header(path, (encoded[:-1] + f', "{NORM}": {json.dumps(header_of(path)[NORM])}}}').encode())


def forget(folder: Path, tensor: str) -> None:
    """Out of its file and out of the index."""
    path = file_of(folder, tensor)
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path)
    index = index_of(folder)
    del index["weight_map"][tensor]
    (folder / INDEX_FILE).write_text(json.dumps(index))


def add(folder: Path, tensor: str) -> None:
    edit_tensors(folder, NORM, lambda tensors: tensors.update({tensor: torch.zeros(3)}))
    edit_index(folder, tensor, file_of(folder, NORM).name)


def single_link_to_nowhere(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX_FILE):
        path.unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")


def as_pickle(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX_FILE]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def link_to_nowhere(folder: Path) -> None:
    path = a_shard(folder)
    path.unlink()
    path.symlink_to(folder.parent / "gone")


def shorten(folder: Path, num_bytes: int) -> None:
    path = a_shard(folder)
    path.write_bytes(path.read_bytes()[:num_bytes])


def twice_in_index(folder: Path) -> None:
    text = (folder / INDEX_FILE).read_text()
    (folder / INDEX_FILE).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{a_shard(folder).name}", '))


def more_tokens(folder: Path) -> None:
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"].append(
        {"id": 5000, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    )
    definition["model"]["vocab"]["<far>"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(definition))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file cut in its weights": (lambda f: shorten(f, -5), r"model-00002.*truncated.*bytes before"),
    "a file cut in its header": (lambda f: shorten(f, 100), r"model-00002.*truncated"),
    "a file cut in its first bytes": (lambda f: shorten(f, 5), r"model-00002.*truncated.*5 bytes"),
    "an empty file": (lambda f: a_shard(f).write_bytes(b""), r"model-00002.*0 bytes"),
    "a header longer than its file": (
        lambda f: a_shard(f).write_bytes(struct.pack("<Q", 10**7) + b"{}"),
        r"model-00002.*header would have",
    ),
    "a header of absurd length": (lambda f: a_shard(f).write_bytes(struct.pack("<Q", 2**63) + b"{}"), r"model-00002.*header would have"),
    "a header that is no JSON": (lambda f: set_header(a_shard(f), b"{not json"), r"model-00002.*damaged header"),
    "a header that is no object": (lambda f: set_header(a_shard(f), b"[1, 2]"), r"model-00002.*not a JSON object"),
    "a header nested without end": (lambda f: set_header(a_shard(f), b"[" * 200_000), r"model-00002.*damaged header"),
    "an error page instead of weights": (
        lambda f: a_shard(f).write_bytes(b"<html>404 not found</html>"),
        r"model-00002.*not a safetensors",
    ),
    "a name that is there twice": (repeat_name, rf"damaged header.*{NORM} occurs twice"),
    "overlapping tensors": (lambda f: edit_header(f, NORM, data_offsets=[0, 32]), r"begins at byte|cannot fill"),
    "a gap between tensors": (lambda f: edit_header(f, NORM, data_offsets=[10**6, 10**6 + 32]), r"model.norm.weight begins at byte"),
    "negative offsets": (lambda f: edit_header(f, NORM, data_offsets=[-32, 0]), r"damaged header at model.norm.weight"),
    "offsets that are text": (lambda f: edit_header(f, NORM, data_offsets=["0", "32"]), r"damaged header at model.norm.weight"),
    "a shape that does not fill its bytes": (lambda f: edit_header(f, NORM, shape=[9]), r"model.norm.weight of shape \[9\]"),
    "a dtype nobody knows": (lambda f: edit_header(f, NORM, dtype="F4"), r"model.norm.weight has the dtype F4"),
    "a dtype of integers": (
        lambda f: edit_header(f, NORM, dtype="I32"),
        r"model does not fit.*not of a floating-point dtype: model.norm.weight",
    ),
    "another shape of as many numbers": (lambda f: edit_header(f, NORM, shape=[2, 4]), r"model.norm.weight \[2, 4\] instead of \[8\]"),
    "bytes after the last tensor": (lambda f: a_shard(f).write_bytes(a_shard(f).read_bytes() + b"more"), r"model-00002.*4 bytes more"),
    "a tensor missing": (lambda f: forget(f, K_BIAS), rf"1 missing: {K_BIAS}"),
    "a tensor too many": (lambda f: add(f, "model.layers.7.mlp.bias"), r"not used by this model: model.layers.7.mlp.bias"),
    "a shard missing": (lambda f: a_shard(f).unlink(), r"names model-00002.*which is missing"),
    "a link to nowhere": (link_to_nowhere, r"names model-00002.*which is missing"),
    "a single file that is a link to nowhere": (single_link_to_nowhere, r"model.safetensors is a link to .*gone, which does not exist"),
    "an index naming a file above": (lambda f: edit_index(f, NORM, "../x.safetensors"), rf"{NORM} is said to be in '\.\./x"),
    "an index naming an absolute path": (lambda f: edit_index(f, NORM, "/etc/passwd"), rf"{NORM} is said to be in '/etc/passwd'"),
    "an index naming a number": (lambda f: edit_index(f, NORM, 7), rf"{NORM} is said to be in 7"),
    "an index naming another file": (lambda f: edit_index(f, NORM, sorted(f.glob("*.safetensors"))[0].name), rf"disagree on {NORM}"),
    "a tensor in two shards": (
        lambda f: edit_tensors(f, "model.embed_tokens.weight", lambda t: t.update({NORM: torch.ones(8)})),
        rf"disagree on {NORM}",
    ),
    "an index naming a tensor twice": (twice_in_index, rf"index.json.*{NORM} occurs twice"),
    "an index cut short": (
        lambda f: (f / INDEX_FILE).write_text((f / INDEX_FILE).read_text()[:200]),
        r"index.json is not a checkpoint index",
    ),
    "an index without a map": (lambda f: (f / INDEX_FILE).write_text("{}"), r"index.json is not a checkpoint index"),
    "an index missing": (lambda f: (f / INDEX_FILE).unlink(), r"its index is missing"),
    "pickles instead of safetensors": (as_pickle, r"pytorch_model.bin is a pickle.*refused"),
    "no configuration": (lambda f: (f / "config.json").unlink(), r"there is no config.json"),
    "a configuration that is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config.json is not JSON"),
    "a configuration without a field": (lambda f: edit_config(f, intermediate_size=None), r"config.json: intermediate_size is missing"),
    "a configuration of another size": (lambda f: edit_config(f, num_hidden_layers=9), r"does not fit its config.json: .* missing"),
    "a configuration of another width": (lambda f: edit_config(f, intermediate_size=50), r"of the wrong shape.*mlp"),
    "another architecture": (lambda f: edit_config(f, architectures=["LlamaForCausalLM"]), r"config.json.*LlamaForCausalLM"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer in .*tokenizer.json"),
    "a tokenizer cut short": (lambda f: (f / "tokenizer.json").write_text("{"), r"tokenizer in .* cannot be used"),
    "a tokenizer of a larger model": (more_tokens, r"tokenizer in .* knows 5001 tokens, the model only"),
    "a chat template that is none": (
        lambda f: (f / "chat_template.jinja").write_text("\n{% if %}"),
        r"chat template in .* cannot be used: it is not a Jinja template: .*\(line 2\)",
    ),
    "a chat template in another encoding": (
        lambda f: (f / "chat_template.jinja").write_bytes("é".encode("latin-1")),
        r"chat template in .* cannot be used: 'utf-8' codec",
    ),
    "an empty folder": (lambda f: [path.unlink() for path in f.iterdir()], r"there is no config.json"),
}


def test_a_sound_checkpoint_passes(whole: Path) -> None:
    check_model(whole, Topology(tp=2))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "store"])
def test_a_damaged_checkpoint_is_refused_at_once(
    damage: str, scheme: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_CACHE", str(tmp_path / "cache"))
    inflict, said = DAMAGES[damage]
    inflict(folder)
    if scheme and ("link to nowhere" in damage or damage == "an empty folder"):
        pytest.skip("a store has no links and no empty folders")
    begun = time.process_time()
    with pytest.raises(UnusableCheckpoint, match=said):
        check_model(f"{scheme}{folder}" if scheme else folder, Topology(tp=2))
    assert time.process_time() - begun < 2  # of this process's own work, so that a busy machine does not count


def start_of(groups: ParallelGroups, folder: Path) -> str:
    """What a rank says when it is to start from ``folder``; its own groups are never reached."""
    try:
        with start_rank(
            checkpoint_folder=folder,
            topology=groups.topology,
            rank=groups.rank,
            rendezvous="tcp://127.0.0.1:9",
            runner_config=RunnerConfig(device="cpu", dtype="float32", kv_cache_bytes=10**6),
            engine_config=EngineConfig(),
        ):
            return "it started"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("damage", ["a file cut in its weights", "a shard missing", "a configuration without a field"])
def test_all_ranks_refuse_with_the_same_words_and_wait_for_nobody(damage: str, folder: Path) -> None:
    inflict, said = DAMAGES[damage]
    inflict(folder)
    first, second = run_ranks(Topology(tp=2), start_of, folder)
    assert first == second
    assert first.startswith(("CheckpointError", "InvalidModelConfig"))
    assert said.split(".*")[0].replace("\\", "") in first
