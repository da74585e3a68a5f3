"""The formats of weights, and that they change no answer that they must not change."""

from collections.abc import Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor

from model.formats import Formats, choose_formats
from parallel.native.library import native
from parallel.native.linear import rounded_rows
from parallel.onednn_format import OneDnnFormat, runs_here
from parallel.packed_format import ANY_LANES, PackedFormat
from parallel.quantised_format import QuantisedFormat
from parallel.weight_format import Dense, WeightFormat

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, FLOAT = torch.bfloat16, torch.float32
needs_kernels = pytest.mark.skipif(native() is None, reason="the kernels are not built here")


@needs_kernels
def test_weights_stored_in_bfloat16_are_held_so_where_sums_are_in_float32() -> None:
    assert choose_formats(CPU, FLOAT, [BF16, BF16]).matrices == PackedFormat("bf16", BF16)
    assert choose_formats(CPU, FLOAT, [BF16, FLOAT]).matrices == PackedFormat("fp32", FLOAT)
    assert choose_formats(CPU, FLOAT, [FLOAT]).matrices == PackedFormat("fp32", FLOAT)


def test_activations_are_rounded_where_that_is_asked_for_and_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with bfloat16 products: our format, or oneDNN's without our kernels."""
    monkeypatch.setattr("model.formats.runs_here", lambda dtype: dtype == BF16)
    monkeypatch.setattr("model.formats.available_kinds", lambda: frozenset(("bf16", "fp32", "bf16_dot")))
    dot = PackedFormat("bf16_dot", BF16)
    assert choose_formats(CPU, FLOAT, [BF16], rounds_activations=True) == Formats(dot, dot)
    assert choose_formats(CPU, FLOAT, [BF16]).matrices == PackedFormat("bf16", BF16)
    assert choose_formats(CPU, BF16, [BF16]).matrices == dot
    assert choose_formats(CPU, FLOAT, [FLOAT], rounds_activations=True).matrices == PackedFormat("fp32", FLOAT)
    assert choose_formats(CPU, FLOAT, [BF16], rounds_activations=True, common_kinds=frozenset(("bf16", "bf16_dot"))) == Formats(dot, dot)
    monkeypatch.setattr("model.formats.available_kinds", frozenset)
    assert choose_formats(CPU, FLOAT, [BF16], rounds_activations=True) == Formats(OneDnnFormat(BF16), Dense(FLOAT))
    monkeypatch.setattr("model.formats.available_kinds", lambda: frozenset(("bf16", "fp32")))
    monkeypatch.setattr("model.formats.runs_here", lambda dtype: False)
    assert choose_formats(CPU, FLOAT, [BF16], rounds_activations=True).matrices == PackedFormat("bf16", BF16)


def test_int4_leaves_embedding_and_head_in_int8() -> None:
    formats = choose_formats(CPU, FLOAT, [BF16], "int4")
    assert (formats.matrices, formats.table) == (PackedFormat("int4", BF16), PackedFormat("int8", BF16))


def test_beside_quantised_weights_activations_are_rounded_where_that_is_asked_for_and_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.formats.available_kinds", lambda: frozenset(("int8", "int4", "int8_dot", "int4_dot", "int4_zeros_dot")))
    int8, int4 = PackedFormat("int8_dot", FLOAT), PackedFormat("int4_dot", FLOAT)
    assert choose_formats(CPU, FLOAT, [FLOAT], "int8", rounds_activations=True) == Formats(int8, int8)
    assert choose_formats(CPU, FLOAT, [FLOAT], "int4", rounds_activations=True) == Formats(int4, int8)
    zeros = choose_formats(CPU, FLOAT, [FLOAT], "int4_zeros", rounds_activations=True)
    assert zeros == Formats(PackedFormat("int4_zeros_dot", FLOAT), int8)
    assert choose_formats(CPU, FLOAT, [FLOAT], "int8").matrices == PackedFormat("int8", FLOAT)
    monkeypatch.setattr("model.formats.available_kinds", lambda: frozenset(("int8", "int4")))
    assert choose_formats(CPU, FLOAT, [FLOAT], "int8", rounds_activations=True).matrices == PackedFormat("int8", FLOAT)


def test_if_experts_move_all_ranks_choose_a_format_that_all_support() -> None:
    """Whatever else this processor has."""
    few, more = frozenset(("bf16", "fp32", "int8", "int4")), frozenset(("bf16", "bf16_dot", "fp32", "int8", "int8_dot", "int4", "int4_dot"))
    for kinds, suffix in ((few, ""), (more, "_dot")):
        found = choose_formats(CPU, FLOAT, [FLOAT], "int4", rounds_activations=True, common_kinds=kinds)
        assert found == Formats(PackedFormat(f"int4{suffix}", FLOAT), PackedFormat(f"int8{suffix}", FLOAT))
        plain = PackedFormat(f"bf16{suffix}", BF16)
        assert choose_formats(CPU, FLOAT, [BF16], rounds_activations=True, common_kinds=kinds) == Formats(plain, plain)
    assert choose_formats(CPU, FLOAT, [BF16], rounds_activations=True, common_kinds=frozenset()) == Formats(Dense(FLOAT), Dense(FLOAT))


def test_a_gpu_has_plain_weights_or_rounded_ones() -> None:
    assert choose_formats(CUDA, BF16, [BF16]) == Formats(Dense(BF16), Dense(BF16))
    assert choose_formats(CUDA, BF16, [BF16], "int4") == Formats(QuantisedFormat("int4", BF16), QuantisedFormat("int8", BF16))


def test_fp8_is_for_devices_that_multiply_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _device: "NVIDIA A100")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (8, 0))
    with pytest.raises(ValueError, match=r"NVIDIA A100 \(compute capability 8\.0\) does not multiply fp8"):
        choose_formats(CUDA, BF16, [BF16], "fp8")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (9, 0))
    assert choose_formats(CUDA, BF16, [BF16], "fp8") == Formats(QuantisedFormat("fp8", BF16), Dense(BF16))
    with pytest.raises(ValueError, match="CPUs do not multiply fp8"):
        choose_formats(CPU, BF16, [BF16], "fp8")


@pytest.mark.parametrize("kind", ["int8", "int4", "int4_zeros"])
def test_a_gpu_rounds_as_a_cpu_does(kind: Literal["int8", "int4", "int4_zeros"]) -> None:
    weight = torch.randn(70, 200, generator=torch.Generator().manual_seed(2))
    everything = torch.arange(70)
    on_gpu, on_cpu = QuantisedFormat(kind, FLOAT), PackedFormat(kind, FLOAT)
    found = on_gpu.rows(everything, on_gpu.prepare({"weight": weight.clone()}), 200)
    assert torch.equal(found, on_cpu.rows(everything, on_cpu.prepare({"weight": weight.clone()}), 200))


def test_without_kernels_nothing_is_packed_unnecessarily(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.formats.available_kinds", frozenset)
    assert choose_formats(CPU, FLOAT, [BF16]).matrices == Dense(FLOAT)


FORMATS: list[WeightFormat] = [
    *(PackedFormat(kind, FLOAT) for kind in ("bf16", "bf16_dot", "int8", "int8_dot", "int4", "int4_dot", "int4_zeros", "int4_zeros_dot")),
    *(QuantisedFormat(kind, FLOAT) for kind in ("int8", "int4", "int4_zeros")),
    OneDnnFormat(FLOAT),
]


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_format_multiplies_by_its_weights(form: WeightFormat, has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_kernels:
        monkeypatch.setattr("parallel.packed_format.native", lambda: None)
    if isinstance(form, OneDnnFormat) and not runs_here(FLOAT):
        pytest.skip("oneDNN has no packed product here")
    generator = torch.Generator().manual_seed(1)
    weight, x, bias = (torch.randn(*shape, generator=generator) for shape in ((70, 200), (2, 3, 200), (70,)))
    tensors = form.prepare({"weight": weight.clone()})
    held = weight if isinstance(form, OneDnnFormat) else form.rows(torch.arange(70), tensors, 200)
    multiplied = rounded_rows(form.kind, x) if isinstance(form, PackedFormat) else x
    torch.testing.assert_close(form.multiply(x, tensors, bias), multiplied @ held.T + bias, rtol=1e-3, atol=2e-3)
    library = native() if has_kernels else None
    panel = 2 * (library.lanes if library else ANY_LANES)
    assert num_bytes(tensors) <= form.bytes_per_weight * -(-70 // panel) * panel * 256 + 70, "filled up to whole panels and groups"


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for name, tensor in tensors.items() if name != "reordered")
