"""With our CPU kernels a token's logits are the same bits whether it was decoded, part of a prompt, or recomputed after a failure, in any
batch.

So a stream that is resumed elsewhere, by kernels of the same variant, reports the same log-probabilities, and greedy answers never diverge.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.groups import single_rank_groups
from parallel.native.library import has_kernel
from parallel.packed_format import PackedFormat
from tests.engine.run.tiny_models import write_dense, write_moe
from tests.model.driver import Driver, build_batch, seeded_prompts

FORMATS = {
    "float32": PackedFormat("fp32", torch.float32),
    "bfloat16": PackedFormat("bf16", torch.bfloat16),
    "bfloat16, rounded activations": PackedFormat("bf16_dot", torch.bfloat16),
    "int8": PackedFormat("int8", torch.float32),
    "int8, rounded activations": PackedFormat("int8_dot", torch.float32),
    "int4": PackedFormat("int4", torch.float32),
    "int4, rounded activations": PackedFormat("int4_dot", torch.float32),
    "int4 with zeros": PackedFormat("int4_zeros", torch.float32),
    "int4 with zeros, rounded activations": PackedFormat("int4_zeros_dot", torch.float32),
}
CASES = [pytest.param(format, id=name, marks=pytest.mark.slow if "zeros" in name else ()) for name, format in FORMATS.items()]


def write_wide_heads(folder: Path) -> Path:
    """Heads of 32, which attention multiplies by AMX tiles where there are any."""
    return write_dense(folder, hidden_size=128)


def decoded(driver: Driver, tokens: list[int], start: int, company: list[int] | None = None) -> Tensor:
    """Logits of every position: the first ``start`` tokens in one step, the others one by one, optionally beside another prompt in
    chunks of 9."""
    sequence, other = driver.start(tokens), driver.start(company or [1])
    while sequence.pending:
        works = [(sequence, start if not sequence.num_computed else 1)]
        works += [(other, min(9, other.pending))] if company and other.pending else []
        driver.step(works)
    return torch.cat(sequence.logits)


@pytest.mark.parametrize("format", CASES)
@pytest.mark.parametrize("write", [write_dense, write_moe, write_wide_heads])
def test_logits_are_the_same_bits_however_a_sequence_was_computed(
    tmp_path: Path, write: Callable[[Path], Path], format: PackedFormat
) -> None:
    if not has_kernel(format.kind):
        pytest.skip("this processor has no such kernel")
    driver = Driver(write(tmp_path), single_rank_groups(), format=format, table_format=format, kv_may_be_bfloat16=format.rounds_rows)
    tokens, company = seeded_prompts(driver.model.config.vocab_size, [150, 90])
    undisturbed = decoded(driver, tokens, 10)
    assert torch.equal(decoded(driver, tokens, 77), undisturbed), "gone on elsewhere after 67 tokens"
    assert torch.equal(driver.whole(tokens), undisturbed)
    assert torch.equal(driver.chunked(tokens, 7), undisturbed)
    assert torch.equal(decoded(driver, tokens, 10, company), undisturbed)


@pytest.mark.parametrize("format", CASES)
@pytest.mark.parametrize("write", [write_dense, write_moe])
@pytest.mark.parametrize("at_once", [True, False])
@torch.no_grad()
def test_hidden_states_of_kept_tokens_are_those_of_all(
    tmp_path: Path, write: Callable[[Path], Path], format: PackedFormat, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel(format.kind):
        pytest.skip("this processor has no such kernel")
    driver = Driver(write(tmp_path), single_rank_groups(), format=format, kv_may_be_bfloat16=format.rounds_rows)
    if not at_once:
        monkeypatch.setattr(driver.model, "native_layers", lambda _cache: None)
    batch = build_batch([(driver.start(prompt), len(prompt)) for prompt in seeded_prompts(driver.model.config.vocab_size, [1, 40, 33])])
    whole_TD = driver.model.hidden(batch, driver.cache)
    kept_R = torch.tensor([0, 40, 73])
    kept_RD = driver.model.hidden(batch, driver.cache, kept_R)
    assert whole_TD is not None
    assert kept_RD is not None
    assert torch.equal(kept_RD, whole_TD[kept_R])
