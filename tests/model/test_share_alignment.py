"""How the shares of ranks divide input features."""

from hypothesis import given
from hypothesis import strategies as st

from model.share_alignment import share_alignment
from parallel.axes import head_share, split
from parallel.topology import Topology
from serve.planning.released_models import SIZES
from serve.planning.shape import ModelShape


def test_one_rank_splits_nothing() -> None:
    assert share_alignment(SIZES["7B"], Topology(pp=4)) == 0


def test_the_examples() -> None:
    assert [share_alignment(SIZES["7B"], Topology(tp=tp)) for tp in (2, 4, 8)] == [256, 128, 64]
    assert share_alignment(SIZES["0.5B"], Topology(tp=2)) == 64, "7 heads of 64"
    assert share_alignment(SIZES["57B-A14B"], Topology(tp=4, ep=4)) == 128
    assert share_alignment(SIZES["57B-A14B"], Topology(dp=8)) == 320, "experts of 2,560 over 8 ranks"


@given(heads=st.integers(1, 9), head_dim=st.integers(1, 9), inner=st.integers(1, 500), tp=st.integers(1, 9))
def test_every_share_begins_at_a_multiple_of_it_and_of_nothing_larger(heads: int, head_dim: int, inner: int, tp: int) -> None:
    tp = min(tp, heads)
    shape = ModelShape(
        name="any", vocab_size=9, hidden_size=9, intermediate_size=inner, num_layers=1, num_heads=heads, num_kv_heads=1,
        head_dim=head_dim, max_context_tokens=9, tied_embeddings=True,
    )  # fmt: skip
    unit = share_alignment(shape, Topology(tp=tp))
    shares = [share for rank in range(tp) for share in (head_share(heads, 1, rank, tp).query.scaled(head_dim), split(inner, rank, tp))]
    begins = {share.spans[0].start for share in shares if len(share)} - {0}
    assert not begins if unit == 0 else all(begin % unit == 0 for begin in begins)
    assert not any(all(begin % larger == 0 for begin in begins) for larger in range(unit + 1, 5000) if begins)
