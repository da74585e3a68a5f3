"""The highest logits by way of 8 bits, against all of them: the same bits, whatever matrices and rows are made of."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.native.library import Native, native
from parallel.native.linear import multiply, pack, unpack
from parallel.native.screened import Screen, Sought, screen_of
from parallel.packed_format import PackedFormat
from parallel.screened_head import MOST_PAUSE, ScreenedHead, screened_head

NOTHING = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def library() -> Native:
    found = native()
    if found is None or found.screened is None:
        pytest.skip("this processor has no such products, or the kernels are not built here")
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spread_out(weight: Tensor) -> Tensor:
    """Lengths as those of tokens that are frequent or never seen, some of nothing at all."""
    weight = weight * torch.logspace(-3, 1, len(weight)).unsqueeze(-1)
    weight[::97] = 0
    return weight


def with_loud_features(weight: Tensor) -> Tensor:
    weight[:, 5], weight[:, -1] = weight[:, 5] * 60, weight[:, -1] * 1e4
    return weight


def nearly_the_same(weight: Tensor) -> Tensor:
    """Each eight outputs differ by the last bit of bfloat16 in one place, or in none."""
    same = weight[::8].repeat_interleave(8, 0)[: len(weight)].bfloat16()
    same[1::4, 3] = same[1::4, 3] * (1 + 2.0**-7)
    return same.float()


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda weight: weight, "spread out": spread_out, "loud features": with_loud_features, "nearly the same": nearly_the_same,
    "tiny": lambda weight: weight * 1e-9, "huge": lambda weight: weight * 1e6,
}  # fmt: skip
SHAPES = {"whole panels": (4096, 256), "ragged": (3001, 200), "wide": (2050, 1500), "narrow": (1999, 64)}


def made(library: Native, weight: Tensor) -> Screen:
    screen = screen_of(library, pack("bf16_dot", weight, library.lanes))
    assert screen is not None
    return screen


def anyhow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it pays or not."""
    monkeypatch.setattr("parallel.native.screened._worth_it", lambda panels, rows: (panels * rows, panels))


def check(
    library: Native, screen: Screen, x: Tensor, highest: int, lowered: list[np.ndarray] | None = None, limit: int | None = None
) -> None:
    limit = screen.exact.num_outputs if limit is None else limit
    lowered = lowered or [NOTHING] * len(x)
    found = screen.multiply(library, x, Sought([highest] * len(x), lowered, limit))
    assert found is not None
    wanted = multiply(library, x, screen.exact, None)
    for of_found, of_all, ids in zip(found[:, :limit], wanted[:, :limit], lowered, strict=True):
        at = torch.from_numpy(ids[ids < limit])
        for share in (1.0, 0.5, torch.inf):  # some are lowered much and others not, as the penalties' signs want it
            some, every = of_found.clone(), of_all.clone()
            some[at], every[at] = some[at] - share * some[at].abs(), every[at] - share * every[at].abs()
            least = every.sort(descending=True).values[highest - 1]
            assert torch.equal(some >= least, every >= least)
            assert torch.equal(some[every >= least], every[every >= least])


@pytest.mark.parametrize("rows", [1, 2, 3, 13, 40])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_is_sought_is_what_all_of_the_matrix_gives_to_the_bit(
    library: Native, shape: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    anyhow(monkeypatch)
    screen, x = made(library, random(*shape)), random(rows, shape[1], seed=rows)
    for highest in (1, 7, 50):
        check(library, screen, x, highest)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("kind", MATRICES)
def test_so_it_is_with_matrices_and_rows_that_round_badly(library: Native, kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    anyhow(monkeypatch)
    screen, x = made(library, MATRICES[kind](random(2500, 320))), random(rows, 320, seed=rows)
    x[:, 17] *= 200
    x[1:, 3] = 1e-20
    for highest in (1, 20):
        check(library, screen, x, highest)


def test_so_it_is_where_the_row_is_one_of_the_outputs(library: Native) -> None:
    """Then one logit stands far above the others: nearly nothing is multiplied twice."""
    weight = random(6000, 256)
    screen = made(library, weight)
    check(library, screen, weight[torch.arange(0, 6000, 500)] * 3, 1)


def test_outputs_that_are_lowered_later_or_not_looked_at_do_not_push_others_out(library: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    anyhow(monkeypatch)
    weight = random(3000, 192)
    weight[2400:] *= 9  # as no token's are
    screen, x = made(library, weight), random(6, 192, seed=5)
    order = multiply(library, x, screen.exact, None)[:, :2400].argsort(descending=True)
    lowered = [order[row, : 3 + 40 * row].numpy() for row in range(5)] + [np.arange(2999)]
    check(library, screen, x[:5], 3, lowered[:5], limit=2400)
    check(library, screen, x[:5], 1, lowered[:5], limit=2387)
    check(library, screen, x[5:], 2, lowered[5:], limit=2400)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_never_hidden(library: Native, bad: float) -> None:
    screen, x = made(library, random(3000, 256)), random(3, 256)
    x[1, 9] = bad
    found = screen.multiply(library, x, Sought([1] * 3, [NOTHING] * 3, 3000))
    assert found is None or not found[1].isfinite().any()
    weight = random(3000, 256)
    weight[1234, 7] = bad
    found = made(library, weight).multiply(library, random(3, 256), Sought([1] * 3, [NOTHING] * 3, 3000))
    assert found is None or not found[:, 1234].isfinite().any()


def test_where_all_are_in_doubt_nothing_is_given(library: Native) -> None:
    screen = made(library, random(1, 256).expand(3000, 256))
    assert screen.multiply(library, random(2, 256), Sought([1] * 2, [NOTHING] * 2, 3000)) is None
    assert made(library, random(3000, 256)).multiply(library, random(2, 256), Sought([2000] * 2, [NOTHING] * 2, 3000)) is None


def test_in_8_bits_it_is_the_matrix_as_int8_would_hold_it(library: Native) -> None:
    weight = random(301, 200).bfloat16().float()
    screen = made(library, weight)
    found = unpack(screen.rough)[:, :200]
    assert (found - weight).abs().max() <= 3 / 253 * weight.abs().max()  # as tests of `linear` say of int8_dot
    lost_P = torch.nn.functional.pad((found - weight).norm(dim=-1), (0, 19)).view(-1, 32).amax(-1)
    assert (screen.lengths[1] >= lost_P).all()
    assert (screen.lengths[1] <= 1.2 * lost_P).all()  # what is lost of features that fill up the last group counts there too


def test_a_head_that_does_not_gain_by_it_tries_ever_more_rarely(library: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    head = ScreenedHead(made(library, random(3000, 256)), 0)
    monkeypatch.setattr(Screen, "multiply", lambda *_: tried.append(True))
    wanted = Sought([1], [NOTHING], 3000)
    for _ in range(200):
        assert head.multiply(random(1, 256), wanted) is None
    assert len(tried) == 9  # after 1, 2, 4, ... 64, 64 others
    monkeypatch.setattr(Screen, "multiply", lambda _self, _library, x, _sought: x)
    for _ in range(MOST_PAUSE + 1):
        head.multiply(random(1, 256), wanted)
    assert all(head.multiply(random(1, 256), wanted) is not None for _ in range(5))


def test_a_share_of_the_vocabulary_knows_its_own_ids_alone(library: Native) -> None:
    format = PackedFormat("bf16_dot", torch.bfloat16)
    weight = random(4000, 256)
    tensors = format.prepare({"weight": weight[2500:].bfloat16()})
    head = screened_head(format, tensors, 2500)
    assert head is not None
    x = weight[[2600, 3300]] * 2
    lowered = [np.array([5, 2499, 2600, 3999]), np.array([10])]
    found = head.multiply(x, Sought([1, 1], lowered, 3990))
    wanted = format.multiply(x, tensors, None)
    assert found is not None
    assert found[1].argmax() == wanted[1].argmax() == 800
    wanted[0, 100], found[0, 100] = -torch.inf, -torch.inf
    assert found[0, :1490].max() == wanted[0, :1490].max()
    assert head.multiply(x.bfloat16(), Sought([1, 1], lowered, 3990)) is None
