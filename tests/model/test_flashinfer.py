"""Prefill by FlashInfer is called correctly, tested with a fake that has its interface (0.7.2) and documented behaviour."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from model.attention.choose import choose_backend
from model.attention.reference import ReferenceAttention, attend_one_head
from tests.model.paged_attention import Paged, Work, heads, unturned

pytest.importorskip("triton")

CPU = torch.device("cpu")


class Wrapper:
    """A slow `flashinfer.BatchPrefillWithPagedKVCacheWrapper`.

    As in the real one, every run reads the plan again, and the plan is copied to the device late: not before an event after it is waited
    for.
    """

    num_plans = 0
    is_copying = False
    """Whether a queued copy has yet to read the only page-locked buffer."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str) -> None:
        assert (float_workspace_buffer.dtype, kv_layout) == (torch.uint8, "NHD")

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *,
        causal: bool, sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert all(x.dtype == torch.int32 for x in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len))
        assert (qo_indptr[0], paged_kv_indptr[0], paged_kv_indptr[-1]) == (0, 0, len(paged_kv_indices))
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        assert sm_scale == head_dim_qk**-0.5
        assert not Wrapper.is_copying, "written over what a queued copy reads"
        Wrapper.num_plans, Wrapper.is_copying = Wrapper.num_plans + 1, True
        self._starts, self._firsts, self._pages, self._last = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._shape, self._group = (page_size, num_kv_heads, head_dim_qk), num_qo_heads // num_kv_heads
        self._causal, self._dtypes = causal, (q_data_type, kv_data_type)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        assert q.is_contiguous()
        assert (q.dtype, paged_kv_cache[0].dtype) == self._dtypes
        assert all(cache.shape[1:] == self._shape for cache in paged_kv_cache)
        assert q.shape[0] == self._starts[-1]
        out = torch.empty_like(q)
        for at in range(len(self._last)):
            tokens = slice(int(self._starts[at]), int(self._starts[at + 1]))
            pages = self._pages[int(self._firsts[at]) : int(self._firsts[at + 1])].long()
            length = (len(pages) - 1) * self._shape[0] + int(self._last[at])
            keys, values = (cache[pages].flatten(0, 1)[:length] for cache in paged_kv_cache)
            for head in range(q.shape[1]):
                kv_head = head // self._group
                out[tokens, head] = attend_one_head(q[tokens, head], keys[:, kv_head], values[:, kv_head], is_causal=self._causal)
        return out


class Event:
    """`torch.cuda.Event`: everything queued before it was recorded is finished once it has been waited for."""

    def __init__(self) -> None:
        self._is_behind_a_copy = False

    def record(self) -> None:
        self._is_behind_a_copy = Wrapper.is_copying

    def synchronize(self) -> None:
        if self._is_behind_a_copy:
            Wrapper.is_copying = False


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrapper, "is_copying", False)
    monkeypatch.setattr("model.attention.flashinfer._event", lambda _device: Event())
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr("model.attention.flashinfer.WORKSPACE_BYTES", 16)


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, and the double on the CPU")
def test_it_computes_prompts_and_not_decodes(is_causal: bool) -> None:
    from model.attention.flashinfer import FlashInferAttention

    config = replace(heads(4, 2), is_causal=is_causal)
    backend = FlashInferAttention(config, CPU)
    works: list[list[Work]] = [[(40, 1), (7, 1), (0, 20), (33, 15), (15, 1 + is_causal)], [(0, 16)], [(0, 1), (20, 1)]]
    if not is_causal:
        works = [[(0, 20), (0, 33)], [(0, 16)]]
    for some in works:
        Wrapper.num_plans = 0
        paged = Paged(config, some, torch.float32)
        found, wanted = paged.attend(backend), paged.attend(ReferenceAttention(config))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)
        has_prompts = any(new > 1 for _, new in some)
        assert Wrapper.num_plans == has_prompts
        if has_prompts:
            again = torch.cat((paged.q, paged.k, paged.v), 1)
            backend.attend(again, unturned(again), paged.keys, paged.values, paged.batch)
            assert Wrapper.num_plans == 1, "one plan serves all layers"
    assert backend.supports_capture


@pytest.mark.usefixtures("flashinfer")
def test_heads_that_are_shared_unevenly_are_refused() -> None:
    from model.attention.flashinfer import FlashInferAttention

    with pytest.raises(ValueError, match="the same number of query heads for every KV head"):
        FlashInferAttention(heads(9, 3, 0, 2), CPU)


def test_dtypes_that_it_does_not_compute_in_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.attention.choose.find_spec", lambda _name: object())
    with pytest.raises(ValueError, match=r"'flashinfer' computes in bfloat16 or float16, not in torch\.float32; choose one of them"):
        choose_backend(torch.device("cuda"), heads(4, 2), "flashinfer", torch.float32)


def test_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.attention.choose.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="pip install flashinfer-python, or choose 'auto'"):
        choose_backend(torch.device("cuda"), heads(4, 2), "flashinfer")
    with pytest.raises(ValueError, match="'flashinfer' does not run on cpu"):
        choose_backend(CPU, heads(4, 2), "flashinfer")
