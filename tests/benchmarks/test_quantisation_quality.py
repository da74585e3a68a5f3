"""The measure of what rounding loses: nothing of a model beside itself, more with fewer bits; and how a grid is smeared."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.quantisation_quality import FORMATS, compared, log_probs, smeared
from tests.engine.run.tiny_models import write_dense


def test_a_model_says_what_it_says_itself_and_less_so_in_fewer_bits(tmp_path: Path) -> None:
    folder = write_dense(tmp_path)
    texts = [torch.arange(2, 40), torch.arange(9, 20)]
    reference = list(log_probs(folder, FORMATS["int8"], texts))
    assert [tuple(found_TV.shape[:1]) for found_TV in reference] == [(38,), (11,)]
    itself = compared(reference, iter(reference), texts)
    assert (itself.kl, itself.same) == (0, 1)
    rounded = compared(reference, log_probs(folder, FORMATS["int4"], texts), texts)
    assert rounded.kl > 1e-6
    assert rounded.perplexity != itself.perplexity


def test_smeared_weights_are_less_than_half_a_step_away_and_on_no_grid(tmp_path: Path) -> None:
    weight = torch.randint(0, 16, (64, 96)) * 0.25 - 1.875
    weight[0, :32] = 1.0
    tensors = {"model.layers.0.mlp.up_proj.weight": weight, "model.embed_tokens.weight": weight.clone(), "model.norm.weight": torch.ones(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    found = load_file(smeared(tmp_path, 1, tmp_path / "smeared") / "model.safetensors")
    away = found.pop("model.layers.0.mlp.up_proj.weight") - weight
    assert 0.06 < away.abs().mean() < 0.065
    assert away.abs().max() <= 0.13
    assert not away[0, :32].any()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
