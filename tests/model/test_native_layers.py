"""Half a layer, and all layers, in one call equal their kernels one after the other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import native_layers
from model.config import ModelConfig
from parallel.experts import RoutedExperts
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.last_collective import LastCollective, read, record_to
from parallel.native.library import has_kernel
from parallel.native.shared_memory_collectives import CollectiveFailed
from parallel.packed_format import PackedFormat
from parallel.topology import Topology
from tests.engine.run.tiny_models import write_dense, write_moe
from tests.model.driver import Driver, build_batch, seeded_prompts
from tests.model.test_same_bits import FORMATS
from tests.ranks import run_ranks

ROUNDED_AGAIN = 0.02
"""Tolerance for logits: a difference in the last bit may round an activation the other way in the next product."""


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("write", [write_dense, write_moe])
def test_fused_layers_give_the_bits_of_separate_kernels(
    tmp_path: Path, write: Callable[[Path], Path], format: PackedFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel(format.kind):
        pytest.skip("this processor has no such kernel")
    driver = Driver(write(tmp_path), single_rank_groups(), format=format, kv_may_be_bfloat16=format.rounds_rows)
    prompts = seeded_prompts(driver.model.config.vocab_size, [70, 33, 5, 1])
    fused = driver.mixed(prompts, 20)  # prompts of one token and of many, decodes, and both in one step
    layers = driver.model.native_layers(driver.cache)
    assert layers is not None
    assert layers.fused is not None
    monkeypatch.setattr(driver.model, "native_layers", lambda _cache: None)
    for experts in (module for module in driver.model.modules() if isinstance(module, RoutedExperts)):
        monkeypatch.setattr(experts, "native_experts", lambda: None)
    kernel_after_kernel = driver.mixed(prompts, 20)
    for found, wanted in zip(fused, kernel_after_kernel, strict=True):
        if write is write_dense:
            assert torch.equal(found, wanted)
        else:  # one uses torch's softmax of the router and sum of a token's experts, the other ours
            torch.testing.assert_close(found, wanted, atol=1e-4 if format.kind in ("fp32", "bf16") else ROUNDED_AGAIN, rtol=0)


def by_ranks(groups: ParallelGroups, folder: Path, prompts: list[list[int]], format: PackedFormat, fused: bool) -> list[Tensor]:
    driver = Driver(folder, groups, format=format, kv_may_be_bfloat16=format.rounds_rows)
    layers = driver.model.native_layers(driver.cache)
    assert layers is not None
    assert (layers.fused is not None) == fused, "sums over ranks are within the call exactly where they go through memory"
    return driver.mixed(prompts, 20)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_sums_over_ranks_within_a_call_give_the_bits_of_sums_between_calls(tmp_path: Path, format: PackedFormat) -> None:
    if not has_kernel(format.kind):
        pytest.skip("this processor has no such kernel")
    folder, prompts = write_dense(tmp_path), seeded_prompts(100, [70, 9, 1])
    wanted = run_ranks(Topology(tp=2), by_ranks, folder, prompts, format, False, transport="gloo")
    found = run_ranks(Topology(tp=2), by_ranks, folder, prompts, format, True, transport="auto")
    for by_gloo, by_memory in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(by_gloo, by_memory, strict=True))


def test_a_large_models_step_is_split_into_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_kernel("fp32"):
        pytest.skip("the kernels are not built here")
    driver = Driver(write_dense(tmp_path), single_rank_groups(), format=FORMATS["float32"])
    layers = driver.model.native_layers(driver.cache)
    assert layers is not None
    assert layers.fused is not None
    config, num_heads = driver.model.config, driver.model.config.num_heads + 2 * driver.model.config.num_kv_heads
    of_layer = config.head_dim * config.hidden_size * (num_heads + config.num_heads) + 3 * config.hidden_size * config.intermediate_size
    assert layers.fused.num_weights == config.num_layers * of_layer

    called: list[int] = []
    monkeypatch.setattr(native_layers, "FEW_PRODUCTS", 3 * layers.fused.num_weights)
    limited = native_layers.NativeLayers(layers.layers, driver.model.groups.tp)
    assert limited.fused is not None
    fused = limited.fused
    monkeypatch.setattr(limited, "fused", lambda batch, x_TD: called.append(len(x_TD)) or fused(batch, x_TD))
    monkeypatch.setattr(driver.model, "native_layers", lambda _cache: limited)
    driver.mixed([[1, 2, 3, 4, 5, 6, 7, 8], [1]], 20)
    driver.chunked([1, 2, 3], 3)
    assert max(called) == 3


def last_of_layers(groups: ParallelGroups, folder: Path, page: Path) -> LastCollective:
    """Computes one token, and then another with a peer that has left."""
    driver = Driver(folder, groups, format=FORMATS["float32"])
    record_to(page / str(groups.rank))
    begun = read(page / str(groups.rank))
    assert begun is None
    batch = build_batch([(driver.start([1]), 1)])
    assert driver.model.hidden(batch, driver.cache) is not None
    last = read(page / str(groups.rank))
    assert isinstance(last, LastCollective)
    assert groups.tp.transport is not None
    assert groups.tp.transport.shared_memory is not None
    if groups.rank == 1:
        groups.tp.transport.shared_memory.close()
        return last
    layers = driver.model.native_layers(driver.cache)
    assert layers is not None
    assert layers.fused is not None
    step = driver.model.backend.step_inputs(driver.model.rope.rotation(batch.positions_T, torch.float32), batch)
    for _ in range(2):  # and so does every later one, immediately
        with pytest.raises(CollectiveFailed, match="rank 1 of the group has left it"):
            layers.fused(step, torch.ones(1, driver.model.config.hidden_size))
    return last


def test_sums_within_the_call_are_noted_and_fail_as_all_sums(tmp_path: Path) -> None:
    folder, page = write_dense(tmp_path), tmp_path / "pages"
    page.mkdir()
    for last in run_ranks(Topology(tp=2), last_of_layers, folder, page, transport="auto"):
        config = ModelConfig.from_checkpoint(folder)
        assert (last.kind, last.axis) == ("all_reduce", "tp")
        assert (last.number, last.elements) == (1 + 2 * config.num_layers, config.hidden_size)  # the embedding's is the first
        assert 0 <= last.ago_s < 60
