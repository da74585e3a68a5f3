"""The paged kernels against the reference."""

from dataclasses import replace

import pytest
import torch

from model.attention.backend import AttentionConfig
from model.attention.reference import ReferenceAttention
from parallel.quantisation import FP8
from tests.model.paged_attention import Paged, Work, heads

HEADS = {
    "one per kv": heads(4, 4, head_dim=16),
    "groups of seven": heads(14, 2, head_dim=64),
    "9/3 heads, rank 0 of 2": heads(9, 3, 0, 2, head_dim=24),
    "28/4 heads, rank 5 of 8": heads(28, 4, 5, 8, head_dim=128),
}
HALF = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
"""Triton's interpreter does no arithmetic in bfloat16."""
WORKS: dict[str, list[Work]] = {
    "one token alone": [(0, 1)],
    "decodes of many lengths": [(0, 1), (3, 1), (500, 1), (63, 1), (64, 1), (15, 1), (16, 1)],
    "whole prompts": [(0, 7), (0, 70)],
    "chunks with a context behind": [(16, 5), (33, 40), (200, 2)],
    "everything": [(40, 1), (130, 1), (0, 20), (5, 40)],
}


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("works", WORKS.values(), ids=WORKS.keys())
def test_the_kernels_agree_with_the_reference(config: AttentionConfig, works: list[Work], device: torch.device) -> None:
    from model.attention.cuda import CudaAttention

    paged = Paged(config, works, torch.float32).to(device)
    fast, reference = paged.attend(CudaAttention(config, device)), paged.attend(ReferenceAttention(config))
    torch.testing.assert_close(fast[0], reference[0], atol=2e-5, rtol=0)
    for written, wanted in zip(fast[1:], reference[1:], strict=True):
        torch.testing.assert_close(written, wanted, equal_nan=True)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())
def test_attention_can_be_bidirectional(config: AttentionConfig, device: torch.device) -> None:
    from model.attention.cuda import CudaAttention

    config = replace(config, is_causal=False)
    paged = Paged(config, [(0, 7), (0, 70), (0, 130)], torch.float32).to(device)
    fast, reference = paged.attend(CudaAttention(config, device)), paged.attend(ReferenceAttention(config))
    torch.testing.assert_close(fast[0], reference[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_within_its_rounding_error(dtype: torch.dtype, device: torch.device) -> None:
    from model.attention.cuda import CudaAttention

    config = HEADS["groups of seven"]
    paged = Paged(config, WORKS["everything"], dtype).to(device)
    fast, reference = paged.attend(CudaAttention(config, device)), paged.attend(ReferenceAttention(config))
    torch.testing.assert_close(fast[0].float(), reference[0].float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("works", WORKS.values(), ids=WORKS.keys())
def test_an_fp8_cache_is_read_and_written_like_the_reference(works: list[Work], device: torch.device) -> None:
    from model.attention.cuda import CudaAttention

    config = HEADS["groups of seven"]
    paged = Paged(config, works, torch.float16, kv_dtype=FP8).to(device)
    fast, reference = paged.attend(CudaAttention(config, device)), paged.attend(ReferenceAttention(config))
    torch.testing.assert_close(fast[0].float(), reference[0].float(), atol=2e-2, rtol=2e-2)
    for written, wanted in zip(fast[1:], reference[1:], strict=True):
        assert written.dtype == FP8
        torch.testing.assert_close(written.float(), wanted.float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("parts", [1, 2, 8, 64])
def test_the_result_does_not_depend_on_the_number_of_parts(parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.attention.cuda import CudaAttention

    monkeypatch.setattr(CudaAttention, "parts", lambda _self, _num_decodes: parts)
    config = HEADS["groups of seven"]
    paged = Paged(config, [(0, 1), (64, 1), (300, 1)], torch.float32).to(device)
    fast, reference = paged.attend(CudaAttention(config, device)), paged.attend(ReferenceAttention(config))
    torch.testing.assert_close(fast[0], reference[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("parts", [1, 16])
def test_a_few_new_tokens_of_a_long_context_are_split_and_causal(parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like draft tokens; unlike a prompt, whose context one program reads from start to end."""
    from model.attention.cuda import CudaAttention

    monkeypatch.setattr(CudaAttention, "parts_of_few", lambda _self, _num_sequences: parts)
    monkeypatch.setattr("model.attention.cuda.prefill", lambda *_arguments, **_options: pytest.fail("that is for prompts"))
    config, works = HEADS["28/4 heads, rank 5 of 8"], [(70, 1), (200, 2), (59, 9)]
    fast = Paged(config, works, torch.float32).to(device).attend(CudaAttention(config, device))[0]
    exact = Paged(config, works, torch.float64).attend(ReferenceAttention(config))[0]
    torch.testing.assert_close(fast.cpu().double(), exact, atol=2e-6, rtol=0)


def test_parts_are_a_power_of_two_and_fewer_with_more_sequences(device: torch.device) -> None:
    from model.attention.cuda import CudaAttention

    backend = CudaAttention(HEADS["one per kv"], device)
    parts = [backend.parts(num_decodes) for num_decodes in (1, 2, 64, 512)]
    assert all(count.bit_count() == 1 for count in parts)
    assert sorted(parts, reverse=True) == parts
    assert parts[-1] == 1
    assert all(backend.parts_of_few(count) <= backend.parts(count) < 4 * backend.parts_of_few(count) for count in (1, 2, 3, 64, 512))


def test_a_sequence_without_tokens_gets_zeros(device: torch.device) -> None:
    """Like the padding of a captured step."""
    from parallel.cuda.paged_attention import HeadGroups
    from parallel.cuda.paged_decode import decode

    keys = torch.full((2, 16, 1, 16), torch.nan, device=device)
    heads = HeadGroups(*(torch.tensor([n], dtype=torch.int32, device=device) for n in (0, 3)), largest_group=3)
    for parts in (1, 4):
        out = torch.full((1, 3, 16), torch.nan, device=device)
        table, lengths = torch.zeros(1, 1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        decode(torch.ones(1, 3, 16, device=device), keys, keys, table, lengths, heads, out, parts=parts)
        assert out.eq(0).all()
