"""The re-expression of a Llama-type GGUF as a Qwen2 checkpoint."""

import pytest
import torch
from safetensors import SafetensorError

from model.checkpoint import write_checkpoint
from serve import demo_model
from serve.demo_model import DemoModelError, as_qwen2, ensure_demo_model, rotary_halves


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """What llama.cpp's converter does to the rows of q and k (its `permute`), written out row by row."""
    rows = weight.shape[0]
    width = rows // heads
    order = []
    for head in range(heads):
        for pair in range(width // 2):
            order += [head * width + pair, head * width + width // 2 + pair]
    return weight[order]


@pytest.mark.parametrize(("heads", "width"), [(1, 6), (3, 8), (9, 64)])
def test_the_rotary_order_is_undone_exactly(heads, width):
    weight = torch.randn(heads * width, 5)
    assert torch.equal(rotary_halves(interleave(weight, heads), heads), weight)


def test_query_key_and_value_get_biases_of_zero_and_nothing_else_does():
    names = ["blk.3.attn_q.weight", "blk.3.attn_k.weight", "blk.3.attn_v.weight", "blk.3.attn_output.weight", "blk.3.ffn_up.weight"]
    made = {name: tensor for source in names for name, tensor in as_qwen2(source, torch.ones(4, 4), heads=2, kv_heads=2)}
    biases = {name for name in made if name.endswith("bias")}
    assert biases == {f"model.layers.3.self_attn.{part}_proj.bias" for part in "qkv"}
    assert all(not made[name].any() for name in biases)
    assert "model.layers.3.self_attn.o_proj.weight" in made
    assert "model.layers.3.mlp.up_proj.weight" in made


def test_a_conversion_that_was_cut_off_leaves_no_folder_that_looks_finished(tmp_path, monkeypatch):
    def cut_off(scratch):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_fetch_gguf", cut_off)
    folder = tmp_path / "demo"
    with pytest.raises(KeyboardInterrupt):
        ensure_demo_model(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_is_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "_fetch_gguf", lambda scratch: pytest.fail("fetched again"))
    (tmp_path / demo_model.COMPLETE).touch()
    assert ensure_demo_model(tmp_path) == tmp_path


def test_a_cache_that_cannot_be_written_to_is_said_with_what_to_set(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DemoModelError, match=r"cannot be kept in .*file/cache: Not a directory; set MANTA_CACHE"):
        ensure_demo_model(tmp_path / "file" / "cache" / "demo-model")


def test_a_disk_that_is_full_is_said_with_what_to_set(tmp_path, monkeypatch):
    def fail(*_arguments, **_options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def fetch(scratch):
        (scratch / "LICENSE").touch()
        return scratch / "model.gguf"

    monkeypatch.setattr(demo_model, "_fetch_gguf", fetch)
    monkeypatch.setattr(demo_model, "_convert", lambda _file, folder, _report: write_checkpoint(folder, {"weight": torch.zeros(4)}, {}))
    monkeypatch.setattr("model.checkpoint.save_file", fail)
    with pytest.raises(DemoModelError, match=r"cannot be kept in .*No space left on device.*; set MANTA_CACHE"):
        ensure_demo_model(tmp_path / "demo-model")
    assert not (tmp_path / "demo-model").exists()
