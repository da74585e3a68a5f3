"""Kernels run on the GPU where there is one, else under Triton's interpreter (`tests/conftest.py`)."""

import pytest
import torch

from parallel.quantisation import quantise_fp8

pytest.importorskip("triton")


@pytest.fixture
def device() -> torch.device:
    torch.manual_seed(0)  # else what a test draws depends on those that the same process ran before it
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def exact_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, quantise to FP8 by torch: Triton 3.7.1's interpreter loses a carry (124.5 becomes 64, not 128)."""
    if not torch.cuda.is_available():
        for module in ("quantised_matmul", "grouped_gemm"):
            monkeypatch.setattr(f"parallel.cuda.{module}.quantise_rows", quantise_fp8)
