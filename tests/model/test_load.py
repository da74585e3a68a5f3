"""Loading: checked before anything is allocated, and each rank reads its own share only."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from model.checkpoint_error import CheckpointError
from model.config import ModelConfig
from model.load import CheckpointMismatch, LoadReport, load_model
from model.qwen2 import Qwen2
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.topology import Topology
from tests.model.driver import CPU, logits_of, mismatch_of, read_report, seeded_prompts
from tests.model.oracle import Oracle, make_oracle
from tests.ranks import run_ranks

MakeOracle = Callable[[str], Oracle]
MakeCopy = Callable[[str], Path]


def load(
    folder: Path, groups: ParallelGroups | None = None, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Qwen2, LoadReport]:
    with Checkpoint(folder) as checkpoint:
        return load_model(
            checkpoint,
            ModelConfig.from_checkpoint(folder),
            groups or single_rank_groups(),
            device=CPU,
            dtype=torch.float32,
            block_tokens=4,
            on_progress=on_progress,
        )


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def test_one_rank_reads_every_byte_once(oracle: MakeOracle) -> None:
    for name in ("9_heads", "14_heads_tied", "moe"):
        _, report = load(oracle(name).folder)
        assert report.bytes_read == report.bytes_of_checkpoint
        assert report.ignored == ()


@pytest.mark.parametrize(
    ("name", "topology", "most"),
    [
        ("28_heads", Topology(tp=2), 0.52),
        ("28_heads", Topology(tp=4), 0.27),
        ("moe", Topology(tp=2), 0.56),  # 9 heads and 3 KV heads: the middle KV head is on both ranks
        ("moe", Topology(tp=2, ep=2), 0.56),
        ("28_heads", Topology(pp=3), 0.46),
    ],
    ids=str,
)
def test_each_rank_reads_its_own_share_only(name: str, topology: Topology, most: float, oracle: MakeOracle) -> None:
    reports = run_ranks(topology, read_report, oracle(name).folder)
    whole = reports[0].bytes_of_checkpoint
    assert sum(report.bytes_read for report in reports) >= whole
    assert max(report.bytes_read for report in reports) <= most * whole


def test_progress_runs_from_nothing_to_everything(oracle: MakeOracle) -> None:
    seen: list[tuple[int, int]] = []
    _, report = load(oracle("moe").folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, report.bytes_read)
    assert seen[-1] == (report.bytes_read, report.bytes_read)
    assert seen == sorted(seen)
    assert len(seen) > 50


@pytest.mark.parametrize(("name", "shard_size"), [("9_heads", "40KB"), ("moe", "60KB"), ("14_heads_tied", "40KB")])
def test_shards_load_as_one_file_does(name: str, shard_size: str, oracle: MakeOracle, tmp_path: Path) -> None:
    sharded = make_oracle(name, tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX_FILE).exists()
    (prompt,) = seeded_prompts(sharded.vocab_size, [9])
    assert torch.equal(logits_of(single_rank_groups(), tmp_path, prompt), logits_of(single_rank_groups(), oracle(name).folder, prompt))


def test_what_is_missing_left_over_or_of_another_shape_is_said_all_at_once(copied: MakeCopy) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.1.self_attn.o_proj.bias"] = torch.zeros(72)
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
        tensors["model.norm.weight"] = torch.zeros(71)

    with pytest.raises(CheckpointMismatch) as caught:
        load(edit(copied("9_heads"), change))
    assert caught.value.missing == ("model.layers.1.self_attn.k_proj.bias",)
    assert caught.value.unused == ("model.layers.1.self_attn.o_proj.bias", "model.layers.9.mlp.up_proj.weight")
    assert caught.value.misshapen == (("model.norm.weight", (71,), (72,)),)
    for name in (*caught.value.missing, *caught.value.unused, "model.norm.weight [71] instead of [72]"):
        assert name in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.missing) == (str(caught.value), caught.value.missing)


def test_a_missing_expert_is_seen_by_the_ranks_that_would_not_hold_it(copied: MakeCopy) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.mlp.experts.5.down_proj.weight"]

    folder = edit(copied("moe"), change)
    for name in run_ranks(Topology(tp=2, ep=2), mismatch_of, folder):
        assert name == ("model.layers.0.mlp.experts.5.down_proj.weight",)


def test_every_stage_sees_what_is_missing_in_another(copied: MakeCopy) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.0.input_layernorm.weight"]

    folder = edit(copied("9_heads"), change)
    for name in run_ranks(Topology(pp=3), mismatch_of, folder):
        assert name == ("model.layers.0.input_layernorm.weight",)


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(copied: MakeCopy, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]

    folder = edit(copied("9_heads"), change)
    monkeypatch.setattr("model.load._fill", lambda *_: pytest.fail("began to load"))
    with pytest.raises(CheckpointMismatch):
        load(folder)


def test_a_tied_head_that_is_stored_all_the_same_is_ignored_and_said(copied: MakeCopy, oracle: MakeOracle) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], 7.0)

    folder = edit(copied("14_heads_tied"), change)
    _, report = load(folder)
    assert report.ignored == ("lm_head.weight",)
    (prompt,) = seeded_prompts(97, [9])
    wanted = oracle("14_heads_tied").logits(prompt)
    torch.testing.assert_close(logits_of(single_rank_groups(), folder, prompt), wanted, atol=1e-4, rtol=0)


def test_an_untied_head_must_be_there(copied: MakeCopy) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["lm_head.weight"]

    with pytest.raises(CheckpointMismatch, match=r"lm_head\.weight"):
        load(edit(copied("9_heads"), change))


def test_a_truncated_file_names_itself_and_the_tensor(copied: MakeCopy) -> None:
    file = copied("9_heads") / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"truncated") as caught:
        load(file.parent)
    assert caught.value.file == str(file)
    assert caught.value.tensor is not None


def test_weights_are_converted_to_the_dtype_asked_for(tmp_path: Path) -> None:
    one = make_oracle("9_heads", tmp_path, dtype=torch.bfloat16)
    (prompt,) = seeded_prompts(one.vocab_size, [12])
    wanted = one.truth().logits(prompt)
    torch.testing.assert_close(logits_of(single_rank_groups(), tmp_path, prompt), wanted, atol=1e-4, rtol=0)


def test_more_ranks_than_heads_are_refused(oracle: MakeOracle) -> None:
    """`parallel.axes.head_share` says so; here that nothing hides it."""
    with pytest.raises(ValueError, match="4 query heads cannot be shared over 5 ranks"):
        run_ranks(Topology(tp=5), read_report, oracle("moe_renormalised").folder)
