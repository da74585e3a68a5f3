"""Tensor-parallel linears and embeddings over real ranks against unsharded ones of torch."""

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.axes import IN, OUT, Axis, Share, head_share, split, whole
from parallel.collectives import all_gather
from parallel.embedding import VocabEmbedding, VocabHead
from parallel.groups import ParallelGroups, single_rank_group
from parallel.linear import Linear, ShapeMismatch, Slot
from parallel.topology import Topology
from parallel.weight_format import Dense, TensorSpec
from tests.parallel.memory_tensor import MemoryTensor
from tests.ranks import run_ranks

DENSE = Dense(torch.float32)
RANKS = [1, 2, 3, 4]
CPU = torch.device("cpu")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def load(layer: Linear, stored: Mapping[str, Tensor]) -> int:
    """Fill all slots from tensors named ``part.tensor``; returns the bytes read."""
    layer.allocate(CPU)
    read = sum(layer.load(slot.part, slot.tensor, MemoryTensor("t", stored[f"{slot.part}.{slot.tensor}"])) for slot in layer.slots())
    layer.finish()
    return read


HEADS, KV_HEADS, HEAD_SIZE, WIDTH = 9, 3, 4, 26
QKV = {
    **{
        f"{part}.weight": random(i, heads * HEAD_SIZE, WIDTH)
        for i, (part, heads) in enumerate([("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)])
    },
    **{
        f"{part}.bias": random(9 + i, heads * HEAD_SIZE) for i, (part, heads) in enumerate([("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)])
    },
}


def split_on_output(groups: ParallelGroups) -> tuple[list[Tensor], int, range, range]:
    share = head_share(HEADS, KV_HEADS, groups.tp.rank, groups.tp.size)
    q, kv = share.query.scaled(HEAD_SIZE), share.kv.scaled(HEAD_SIZE)
    layer = Linear(in_share=whole(WIDTH), out_parts={"q": q, "k": kv, "v": kv}, bias=True, format=DENSE, bias_dtype=torch.float32)
    read = load(layer, QKV)
    return list(layer(random(5, 7, WIDTH)).split(layer.out_sizes, dim=-1)), read, q.spans[0], kv.spans[0]


@pytest.mark.parametrize("ranks", RANKS)
def test_fused_parts_split_on_their_output_hold_the_heads_of_each_rank(ranks: int) -> None:
    x = random(5, 7, WIDTH)
    whole_outputs = {part: F.linear(x, QKV[f"{part}.weight"], QKV[f"{part}.bias"]) for part in "qkv"}
    for outputs, read, q, kv in run_ranks(Topology(tp=ranks), split_on_output):
        for part, output, rows in zip("qkv", outputs, (q, kv, kv), strict=True):
            assert_near(output, whole_outputs[part][:, rows.start : rows.stop])
        assert read == 4 * (len(q) + 2 * len(kv)) * (WIDTH + 1)


def split_on_input(groups: ParallelGroups, size: int) -> Tensor:
    share = split(size, groups.tp.rank, groups.tp.size)
    layer = Linear(in_share=share, out_parts={"": whole(6)}, bias=True, format=DENSE, bias_dtype=torch.float32, reduce=groups.tp)
    load(layer, {".weight": random(1, 6, size), ".bias": random(2, 6)})
    (span,) = share.spans
    out: Tensor = layer(random(3, 5, size)[:, span.start : span.stop])
    return out


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", [2, 8, 13])
def test_a_row_parallel_layer_sums_over_ranks_and_adds_its_bias_once(ranks: int, size: int) -> None:
    wanted = F.linear(random(3, 5, size), random(1, 6, size), random(2, 6))
    for found in run_ranks(Topology(tp=ranks), split_on_input, size):
        assert_near(found, wanted)


def test_a_wrong_shape_names_the_tensor_and_both_shapes() -> None:
    layer = Linear(in_share=whole(4), out_parts={"": whole(6)}, bias=False, format=DENSE, bias_dtype=torch.float32)
    layer.allocate(CPU)
    with pytest.raises(ShapeMismatch, match=r"mlp.up: shape \[4, 6\] in the checkpoint, \[6, 4\] in the model"):
        layer.load("", "weight", MemoryTensor("mlp.up", torch.zeros(4, 6)))


@dataclass(frozen=True)
class Grouped:
    """A format with packed dims: codes transposed (in, out), one scale per 8 inputs."""

    def specs(self) -> Mapping[str, TensorSpec]:
        return {"codes": TensorSpec((IN, OUT), torch.int8), "scales": TensorSpec((Axis("in", 8), OUT), torch.float32)}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        size = tensors["codes"].shape[0]
        return {"matrix": tensors["codes"] * tensors["scales"].repeat_interleave(8, dim=0)[:size]}

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        return x @ tensors["matrix"] if bias is None else x @ tensors["matrix"] + bias


GROUPED = {
    f"{part}.{name}": tensor
    for i, part in enumerate(("gate", "up"))
    for name, tensor in (("codes", (random(i, 44, 10) * 50).to(torch.int8)), ("scales", random(7 + i, 6, 10)))
}


def grouped_on_input(groups: ParallelGroups) -> Tensor:
    share = split(44, groups.tp.rank, groups.tp.size, unit=8)
    layer = Linear(
        in_share=share,
        out_parts={"gate": whole(10), "up": whole(10)},
        bias=False,
        format=Grouped(),
        bias_dtype=torch.float32,
        reduce=groups.tp,
    )
    load(layer, GROUPED)
    (span,) = share.spans
    out: Tensor = layer(random(3, 5, 44)[:, span.start : span.stop])
    return out


@pytest.mark.parametrize("ranks", RANKS)
def test_a_format_with_packed_dims_is_split_in_whole_groups(ranks: int) -> None:
    matrices = [GROUPED[f"{p}.codes"] * GROUPED[f"{p}.scales"].repeat_interleave(8, dim=0)[:44] for p in ("gate", "up")]
    wanted = random(3, 5, 44) @ torch.cat(matrices, dim=1)
    for found in run_ranks(Topology(tp=ranks), grouped_on_input):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)


def test_slots_state_whole_shapes_whatever_the_share() -> None:
    layer = Linear(
        in_share=split(44, 1, 3, unit=8), out_parts={"gate": Share(10, (range(3),))}, bias=False, format=Grouped(), bias_dtype=torch.float32
    )
    assert list(layer.slots()) == [Slot("gate", "codes", (44, 10)), Slot("gate", "scales", (6, 10))]


def embed_and_score(groups: ParallelGroups, vocab: int, tied: bool) -> tuple[Tensor, Tensor]:
    size = {"vocab_size": vocab, "hidden_size": 6, "group": groups.tp, "dtype": torch.float32}
    embedding = VocabEmbedding(**size)  # type: ignore[arg-type]
    head = VocabHead(**size, tied=embedding if tied else None)  # type: ignore[arg-type]
    for seed, rows in ((1, embedding), (2, head.rows)):
        if not rows.tensors:
            rows.allocate(CPU)
            for slot in rows.slots():
                rows.load(slot.part, slot.tensor, MemoryTensor("v", random(seed, *slot.shape)))
            rows.finish()
    return embedding(torch.arange(vocab).flip(0)), head(random(3, 4, 6))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab", [3, 16, 37])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_vocabulary_split_by_rows_embeds_and_scores_like_the_whole(ranks: int, vocab: int, tied: bool) -> None:
    matrix = random(1, vocab, 6)
    for vectors, logits in run_ranks(Topology(tp=ranks), embed_and_score, vocab, tied):
        assert torch.equal(vectors, matrix.flip(0))
        assert_near(logits, F.linear(random(3, 4, 6), matrix if tied else random(2, vocab, 6)))


def no_rows(groups: ParallelGroups) -> tuple[int, ...]:
    return tuple(all_gather(torch.zeros(0, 3), groups.tp, dim=-1, sizes=[3, 3]).shape)


def test_no_rows_have_logits_of_the_right_width() -> None:
    assert run_ranks(Topology(tp=2), no_rows) == [(0, 6), (0, 6)]


def test_one_rank_needs_no_group() -> None:
    embedding = VocabEmbedding(vocab_size=5, hidden_size=2, group=single_rank_group("tp"), dtype=torch.float32)
    embedding.allocate(CPU)
    with pytest.raises(ShapeMismatch):
        embedding.load("", "weight", MemoryTensor("v", torch.zeros(5, 3)))
