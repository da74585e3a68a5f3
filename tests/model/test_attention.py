"""Fast attention backends against the reference, over a paged KV cache."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.attention.backend import AttentionConfig
from model.attention.choose import choose_backend
from model.attention.cpu import TILE_TOKENS, CpuAttention, group_by_length
from model.attention.native import NativeAttention
from model.attention.reference import ReferenceAttention
from parallel.native.library import Native, native
from tests.kernels_without_tiles import kernels_without_tiles
from tests.model.paged_attention import Paged, Work, heads, unturned

CPU = torch.device("cpu")

FastAttention = CpuAttention | NativeAttention

HEADS = {
    "one per kv": heads(4, 4),
    "groups of seven": heads(14, 2),
    "9/3 heads, rank 0 of 2": heads(9, 3, 0, 2),
    "9/3 heads, rank 1 of 2": heads(9, 3, 1, 2),
    "28/4 heads, rank 1 of 3": heads(28, 4, 1, 3),
    "28/4 heads, rank 5 of 8": heads(28, 4, 5, 8),
}


WORKS: dict[str, list[Work]] = {
    "one token alone": [(0, 1)],
    "one decode": [(129, 1)],
    "equal decodes": [(63, 1), (63, 1)],
    "decodes of many lengths": [(0, 1), (3, 1), (4095, 1), (200, 1), (210, 1), (15, 1), (16, 1)],
    "whole prompts": [(0, 7), (0, 130)],
    "decodes and a long prompt": [(0, 1), (0, 1), (0, 4096)],
    "chunks with a context behind": [(16, 5), (33, 130), (1000, 2)],
    "a chunk longer than a tile": [(70, TILE_TOKENS + 33)],
    "everything": [(40, 1), (700, 1), (0, 20), (5, 40)],
}


@pytest.fixture(params=["cpu", "native"])
def fast_backend(request: pytest.FixtureRequest) -> Callable[[AttentionConfig], FastAttention]:
    """Creates the backend of that name."""
    if request.param == "cpu":
        return CpuAttention
    library = native()
    if library is None:
        pytest.skip("the kernels are not built here")
    return lambda config: NativeAttention(config, library)


MakeFast = Callable[[AttentionConfig], FastAttention]


@pytest.fixture
def library() -> Native:
    found = native()
    if found is None:
        pytest.skip("the kernels are not built here")
    return found


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def kv_dtype(request: pytest.FixtureRequest, library: Native) -> torch.dtype:
    """The dtypes that our kernels support for the KV cache."""
    dtype: torch.dtype = request.param
    if dtype not in library.prefill:
        pytest.skip(f"this processor does not multiply {dtype}")
    return dtype


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("works", WORKS.values(), ids=WORKS.keys())
def test_the_fast_backend_agrees_with_the_reference(config: AttentionConfig, works: list[Work], fast_backend: MakeFast) -> None:
    paged = Paged(config, works, torch.float32)
    fast, reference = paged.attend(fast_backend(config)), paged.attend(ReferenceAttention(config))
    torch.testing.assert_close(fast[0], reference[0], atol=2e-5, rtol=0)
    for ours, theirs in zip(fast[1:], reference[1:], strict=True):
        assert torch.equal(ours.nan_to_num(1e9), theirs.nan_to_num(1e9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())
def test_in_half_precision_they_agree_to_its_rounding(dtype: torch.dtype, config: AttentionConfig, fast_backend: MakeFast) -> None:
    paged = Paged(config, WORKS["everything"], dtype)
    fast, reference = paged.attend(fast_backend(config))[0], paged.attend(ReferenceAttention(config))[0]
    torch.testing.assert_close(fast.float(), reference.float(), atol=4 * torch.finfo(dtype).eps, rtol=0.02)


@pytest.mark.parametrize(
    "config", [*HEADS.values(), heads(14, 2, head_dim=64), heads(4, 2, head_dim=128), heads(3, 1, head_dim=80)], ids=str
)
@pytest.mark.parametrize("works", WORKS.values(), ids=WORKS.keys())
def test_with_keys_and_values_in_bfloat16_they_agree_to_its_rounding(config: AttentionConfig, works: list[Work], library: Native) -> None:
    """The kernel rounds queries and weights once each, the reference does not."""
    if torch.bfloat16 not in library.prefill:
        pytest.skip("this processor does not multiply bfloat16")
    paged = Paged(config, works, torch.float32, kv_dtype=torch.bfloat16)
    fast, reference = paged.attend(NativeAttention(config, library)), paged.attend(ReferenceAttention(config))
    torch.testing.assert_close(fast[0], reference[0], atol=4 * 2.0**-8, rtol=0)
    assert (fast[0] - reference[0]).norm() < 2.0**-8 * reference[0].norm()
    for ours, theirs in zip(fast[1:], reference[1:], strict=True):
        assert torch.equal(ours.nan_to_num(1e9), theirs.nan_to_num(1e9))


@pytest.mark.parametrize("block_tokens", [8, 24, 32])
def test_blocks_of_any_size_give_the_same_bits(block_tokens: int, library: Native) -> None:
    """Tiles of keys are read in place only from blocks that have whole ones."""
    if torch.bfloat16 not in library.prefill:
        pytest.skip("this processor does not multiply bfloat16")
    config, works = heads(14, 2, head_dim=64), [(0, 1), (0, 150)]
    usual = Paged(config, works, torch.float32, kv_dtype=torch.bfloat16)
    wanted = usual.attend(NativeAttention(config, library))[0]
    config = replace(config, block_tokens=block_tokens)
    paged = Paged(config, works, torch.float32, kv_dtype=torch.bfloat16)
    paged.q, paged.k, paged.v = usual.q, usual.k, usual.v
    assert wanted.isfinite().all()
    assert torch.equal(paged.attend(NativeAttention(config, library))[0], wanted)


@pytest.mark.parametrize("works", WORKS.values(), ids=WORKS.keys())
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_tiles_agree_with_vectors(head_dim: int, works: list[Work], library: Native) -> None:
    """The same numbers are rounded, but summed in another order."""
    other = kernels_without_tiles()
    config = heads(14, 2, head_dim=head_dim)
    paged = Paged(config, works, torch.float32, kv_dtype=torch.bfloat16)
    tiles, vectors = (paged.attend(NativeAttention(config, each))[0] for each in (library, other))
    assert (tiles - vectors).norm() < 2.0**-9 * vectors.norm()


def test_the_reference_is_the_formula() -> None:
    """Against torch's own attention on one unpaged sequence, with KV heads repeated."""
    config = HEADS["groups of seven"]
    paged = Paged(config, [(0, 21)], torch.float32)
    q, k, v = (x.transpose(0, 1) for x in (paged.q, paged.k, paged.v))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(7, 0), v.repeat_interleave(7, 0), is_causal=True)
    torch.testing.assert_close(paged.attend(ReferenceAttention(config))[0], wanted.transpose(0, 1), atol=1e-5, rtol=0)


def test_a_sequence_whose_cache_holds_nan_spoils_no_other(fast_backend: MakeFast) -> None:
    config = HEADS["9/3 heads, rank 0 of 2"]
    paged = Paged(config, [(40, 1), (60, 1), (0, 9)], torch.float32)
    healthy = paged.attend(fast_backend(config))[0]
    first_of_second = paged.batch.block_tables_SM[1, 0]
    paged.values[first_of_second] = torch.nan
    spoilt = paged.attend(fast_backend(config))[0]
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, *range(2, 11)]], healthy[[0, *range(2, 11)]])


def test_nan_of_a_cache_is_seen_in_its_sequence_and_nowhere_else(library: Native, kv_dtype: torch.dtype) -> None:
    config = HEADS["groups of seven"]
    paged = Paged(config, [(40, 1), (60, 1), (40, 9), (60, 100), (0, 30)], torch.float32, kv_dtype=kv_dtype)
    healthy = paged.attend(NativeAttention(config, library))[0]
    assert healthy.isfinite().all()
    for cache in (paged.keys, paged.values):
        for sequence, rows in ((1, slice(1, 2)), (3, slice(11, 111))):
            block = paged.batch.block_tables_SM[sequence, 1]
            before, cache[block] = cache[block].clone(), torch.nan
            spoilt = paged.attend(NativeAttention(config, library))[0]
            cache[block] = before
            assert spoilt[rows].isnan().all()
            assert torch.equal(spoilt[: rows.start], healthy[: rows.start])
            assert torch.equal(spoilt[rows.stop :], healthy[rows.stop :])


def test_a_decode_gives_the_same_bits_in_any_batch(library: Native, kv_dtype: torch.dtype) -> None:
    config = HEADS["28/4 heads, rank 1 of 3"]
    alone = Paged(config, [(129, 1)], torch.float32, kv_dtype=kv_dtype)
    among_others = Paged(config, [(129, 1), (3, 1), (700, 1), (5, 40)], torch.float32, kv_dtype=kv_dtype)
    blocks, others = alone.batch.block_tables_SM[0].long(), among_others.batch.block_tables_SM[0, :9].long()
    among_others.keys[others], among_others.values[others] = alone.keys[blocks], alone.values[blocks]
    for name in ("q", "k", "v"):
        getattr(among_others, name)[0] = getattr(alone, name)[0]
    found = [paged.attend(NativeAttention(config, library))[0][0] for paged in (alone, among_others)]
    assert torch.equal(*found)


@pytest.mark.parametrize("start", [1, 63, 64, 100, 128])
def test_a_prompt_gives_the_same_bits_however_it_is_chunked(start: int, library: Native, kv_dtype: torch.dtype) -> None:
    config = HEADS["28/4 heads, rank 1 of 3"]
    paged = Paged(config, [(0, 150)], torch.float32, kv_dtype=kv_dtype)
    whole, paged.keys, paged.values = paged.attend(NativeAttention(config, library))
    paged.q, paged.k, paged.v = paged.q[start:], paged.k[start:], paged.v[start:]
    paged.batch = replace(
        paged.batch, positions_T=paged.batch.positions_T[start:], slots_T=paged.batch.slots_T[start:], query_starts=(0, 150 - start)
    )
    assert torch.equal(paged.attend(NativeAttention(config, library))[0], whole[start:])


@pytest.mark.parametrize("position", [0, 15, 62, 63, 64, 127, 128, 149])
@pytest.mark.parametrize("config", [*HEADS.values(), heads(14, 2, head_dim=64), heads(4, 2, head_dim=128)], ids=str)
def test_a_decoded_token_gives_the_same_bits_as_one_of_a_prompt(
    config: AttentionConfig, position: int, library: Native, kv_dtype: torch.dtype
) -> None:
    """So that a stream that is resumed elsewhere continues with the same log-probabilities."""
    paged = Paged(config, [(0, position + 1)], torch.float32, kv_dtype=kv_dtype)
    whole, paged.keys, paged.values = paged.attend(NativeAttention(config, library))
    paged.q, paged.k, paged.v = paged.q[-1:], paged.k[-1:], paged.v[-1:]
    paged.batch = replace(
        paged.batch, positions_T=paged.batch.positions_T[-1:], slots_T=paged.batch.slots_T[-1:], query_starts=(0, 1), num_decodes=1
    )
    assert torch.equal(paged.attend(NativeAttention(config, library))[0], whole[-1:])


def test_nan_before_a_prompt_is_seen_in_it_and_nowhere_else(fast_backend: MakeFast) -> None:
    config = HEADS["groups of seven"]
    paged = Paged(config, [(40, 9), (60, 100), (0, 30)], torch.float32)
    healthy = paged.attend(fast_backend(config))[0]
    for cache in (paged.keys, paged.values):
        cache[paged.batch.block_tables_SM[1, 1]] = torch.nan
        spoilt = paged.attend(fast_backend(config))[0]
        assert spoilt[9:109].isnan().all()
        assert torch.equal(spoilt[:9], healthy[:9])
        assert torch.equal(spoilt[109:], healthy[109:])
        cache[paged.batch.block_tables_SM[1, 1]] = 0.5


def test_sequences_of_very_different_length_are_not_padded_to_each_other() -> None:
    assert group_by_length((1000, 900, 20, 4000, 60)) == [[3], [0, 1], [4, 2]]
    lengths = tuple(range(100, 4000, 37))
    groups = group_by_length(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    padded = sum(len(group) * max(lengths[index] for index in group) for group in groups)
    assert padded < 1.2 * sum(lengths)


def test_a_step_without_tokens_attends_to_nothing(fast_backend: MakeFast) -> None:
    config = HEADS["one per kv"]
    paged = Paged(config, [(3, 1)], torch.float32)
    empty = replace(
        paged.batch,
        slots_T=torch.empty(0, dtype=torch.int64),
        block_tables_SM=torch.empty(0, 0, dtype=torch.int32),
        query_starts=(0,),
        context_lengths=(),
        num_decodes=0,
    )
    backend = fast_backend(config)
    backend.prepare(empty)
    heads_of_none = paged.q.new_empty(0, 12, config.head_dim)
    assert backend.attend(heads_of_none, unturned(heads_of_none), paged.keys, paged.values, empty).shape == (0, 4, config.head_dim)


def test_the_backend_is_chosen_by_device_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    config = HEADS["one per kv"]
    assert isinstance(choose_backend(CPU, config), CpuAttention if native() is None else NativeAttention)
    assert isinstance(choose_backend(CPU, config, "cpu"), CpuAttention)
    assert isinstance(choose_backend(CPU, config, "reference"), ReferenceAttention)
    with pytest.raises(ValueError, match="does not run on cpu"):
        choose_backend(CPU, config, "cuda")
    assert isinstance(choose_backend(torch.device("cuda"), config, "reference"), ReferenceAttention)
    with pytest.raises(ValueError, match="does not run on cuda"):
        choose_backend(torch.device("cuda"), config, "cpu")
    monkeypatch.setattr("model.attention.choose.find_spec", lambda _name: None)
    assert isinstance(choose_backend(torch.device("cuda"), config), ReferenceAttention), "without triton"


@pytest.mark.parametrize("works", [[(0, 130)], [(150, 1), (150, 3)]], ids=["a prompt", "decoded and behind a context"])
def test_a_score_beyond_float32_has_no_weight_if_negative_and_spoils_its_row_if_not(
    works: list[Work], library: Native, kv_dtype: torch.dtype
) -> None:
    """As in torch's attention, for every dtype of the cache."""
    config = HEADS["groups of seven"]
    paged = Paged(config, works, torch.float32, kv_dtype=kv_dtype)
    paged.q = paged.q.abs() + 1
    paged.k[0] = -1e38
    paged.keys[paged.batch.block_tables_SM[0, 0], 3] = -1e38  # of the context, if there is any
    found, wanted = paged.attend(NativeAttention(config, library))[0], paged.attend(ReferenceAttention(config))[0]
    sees_nothing_else = works[0][0] == 0
    assert found[0].isnan().all() == wanted[0].isnan().all() == sees_nothing_else
    rest = slice(int(sees_nothing_else), None)
    assert found[rest].isfinite().all()
    torch.testing.assert_close(found[rest], wanted[rest], atol=2e-5 if kv_dtype == torch.float32 else 0.02, rtol=0)
    paged.k[0] = 1e38
    spoilt = paged.attend(NativeAttention(config, library))[0]
    assert spoilt[0].isnan().all()
