"""Matrices loaded in pieces, by rows and by columns, equal those loaded at once."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from parallel import weight_format
from parallel.axes import Share, whole
from parallel.linear import Linear
from parallel.native.linear import Kind
from parallel.packed_format import PackedFormat
from parallel.weight_format import PIECE_MULTIPLE, Dense, StreamingFormat, stream_pieces
from tests.parallel.memory_tensor import MemoryTensor

CPU = torch.device("cpu")


class ByInputs(MemoryTensor):
    piece_dim = 1  # type: ignore[assignment]
    piece_bytes = 100_000


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).bfloat16()


@pytest.mark.parametrize("kind", [MemoryTensor, ByInputs])
def test_pieces_begin_at_multiples_and_cover_the_part(kind: type[MemoryTensor]) -> None:
    whole_NK, found_NK = random(700, 650), torch.zeros(501, 390).bfloat16()
    stored, begun = kind("t", whole_NK), []

    def take(output: int, first: int, piece_NK: Tensor) -> None:
        begun.append(output + first)
        found_NK[output : output + piece_NK.shape[0], first : first + piece_NK.shape[1]] = piece_NK

    assert stream_pieces(stored, (slice(100, 601), slice(60, 450)), take) == 501 * 390 * 2
    assert torch.equal(found_NK, whole_NK[100:601, 60:450])
    assert len(begun) > 1
    assert not any(place % PIECE_MULTIPLE for place in begun)
    assert all(later > earlier for earlier, later in pairwise(begun))
    assert stored.num_read == found_NK.numel()


def test_pieces_after_other_outputs_end_at_panel_borders() -> None:
    whole_NK, found_NK, begun = random(700, 300), torch.zeros(700, 300).bfloat16(), []

    def take(output: int, first: int, piece_NK: Tensor) -> None:
        assert first == 0
        begun.append(output)
        found_NK[output - 150 : output - 150 + len(piece_NK)] = piece_NK

    assert stream_pieces(MemoryTensor("t", whole_NK), (slice(None), slice(None)), take, before=150) == 700 * 300 * 2
    assert torch.equal(found_NK, whole_NK)
    assert begun == [150, *range(2 * PIECE_MULTIPLE, 850, PIECE_MULTIPLE)]


def test_nothing_is_read_if_a_rank_holds_nothing() -> None:
    for part in ((slice(5, 5), slice(None)), (slice(None), slice(9, 9))):
        assert stream_pieces(MemoryTensor("t", random(20, 10)), part, lambda *_: pytest.fail("a piece")) == 0


@pytest.mark.parametrize("stored", [MemoryTensor, ByInputs])
@pytest.mark.parametrize("kind", ["bf16", "bf16_dot", "fp32", "int8", "int8_dot", "int4", "int4_dot", "int4_zeros_dot"])
def test_fused_parts_loaded_piece_by_piece_equal_those_loaded_at_once(kind: Kind, stored: type[MemoryTensor]) -> None:
    """One piece ends within a panel of the packed matrix, one begins there, and one has part of the input features."""
    format, inputs = PackedFormat(kind, torch.bfloat16), Share(700, (range(128, 700),))
    gate, up = random(205, 700), random(330, 700)
    layer = Linear(
        in_share=inputs,
        out_parts={"gate": whole(205), "up": Share(330, (range(7, 300),))},
        bias=False,
        format=format,
        bias_dtype=torch.float32,
    )
    layer.allocate(CPU)
    for part, matrix in (("up", up), ("gate", gate)):
        layer.load(part, "weight", stored(part, matrix))
    layer.finish()
    wanted = format.prepare({"weight": torch.cat((gate, up[7:300]))[:, 128:]})
    assert layer.tensors.keys() == wanted.keys()
    assert all(torch.equal(layer.tensors[name], wanted[name]) for name in wanted)


def test_a_plain_matrix_is_not_streamed() -> None:
    assert not isinstance(Dense(torch.float32), StreamingFormat)


@pytest.mark.parametrize("is_replicated", [False, True])
def test_replicated_products_do_not_use_autotuned_kernels(is_replicated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []

    def uses_gemv(x: Tensor) -> bool:
        asked.append(x)
        return False

    monkeypatch.setattr(weight_format, "uses_gemv", uses_gemv)
    Dense(torch.float32, is_replicated).multiply(torch.ones(1, 3), {"weight": torch.ones(2, 3)}, None)
    assert bool(asked) is not is_replicated
