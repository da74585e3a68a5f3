"""Half a layer in one call against its kernels one after the other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.experts import RoutedExperts
from parallel.groups import single_rank_groups
from parallel.native.library import multiplies
from parallel.packed_format import PackedFormat
from tests.engine.run.tiny_models import write_dense, write_moe
from tests.model.driver import Driver, seeded_prompts
from tests.model.test_same_bits import FORMATS

ROUNDED_AGAIN = 0.02
"""Of logits: a last bit of difference may round a row's number the other way in the next product."""


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("write", [write_dense, write_moe])
def test_layers_at_once_give_the_bits_of_kernel_after_kernel(
    tmp_path: Path, write: Callable[[Path], Path], format: PackedFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not multiplies(format.kind):
        pytest.skip("this processor has no such kernel")
    driver = Driver(write(tmp_path), single_rank_groups(), format=format, rounds_kv=format.rounds_rows)
    prompts = seeded_prompts(driver.model.config.vocab_size, [70, 33, 5, 1])
    at_once = driver.mixed(prompts, 20)  # prompts of one token and of many, decodes, and both in one step
    layers = driver.model.layers_at_once(driver.cache)
    assert layers
    assert all(layer.is_whole for layer in layers)
    monkeypatch.setattr(driver.model, "layers_at_once", lambda _cache: None)
    for experts in (module for module in driver.model.modules() if isinstance(module, RoutedExperts)):
        monkeypatch.setattr(experts, "on_cpu", lambda: None)
    kernel_after_kernel = driver.mixed(prompts, 20)
    for found, wanted in zip(at_once, kernel_after_kernel, strict=True):
        if write is write_dense:
            assert torch.equal(found, wanted)
        else:  # the softmax of the router and the sum of a token's experts are torch's in one and ours in the other
            torch.testing.assert_close(found, wanted, atol=1e-4 if format.kind in ("fp32", "bf16") else ROUNDED_AGAIN, rtol=0)
