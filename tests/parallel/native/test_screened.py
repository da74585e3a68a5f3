"""Top logits by 8-bit screening against the whole product: bit-identical for any matrices and rows."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.native.library import Native, native
from parallel.native.linear import multiply, pack, unpack
from parallel.native.screened import Screen, TopLogits, screen_of
from parallel.packed_format import PackedFormat
from parallel.screened_head import MAX_PAUSE, ScreenedHead, screened_head

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
    """Norms as those of frequent tokens and of tokens never seen, some of them zero."""
    weight = weight * torch.logspace(-3, 1, len(weight)).unsqueeze(-1)
    weight[::97] = 0
    return weight


def with_loud_features(weight: Tensor) -> Tensor:
    weight[:, 5], weight[:, -1] = weight[:, 5] * 60, weight[:, -1] * 1e4
    return weight


def nearly_the_same(weight: Tensor) -> Tensor:
    """Groups of eight outputs differ in the last bit of bfloat16 of one weight, or not at all."""
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
    """Whether screening pays off or not."""
    monkeypatch.setattr("parallel.native.screened._worth_it", lambda panels, rows: (panels * rows, panels))


def check(
    library: Native, screen: Screen, x: Tensor, highest: int, lowered: list[np.ndarray] | None = None, limit: int | None = None
) -> None:
    limit = screen.exact.num_outputs if limit is None else limit
    lowered = lowered or [NOTHING] * len(x)
    found = screen.multiply(library, x, TopLogits([highest] * len(x), lowered, limit))
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
def test_top_logits_are_bit_identical_to_the_whole_product(
    library: Native, shape: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    anyhow(monkeypatch)
    screen, x = made(library, random(*shape)), random(rows, shape[1], seed=rows)
    for highest in (1, 7, 50):
        check(library, screen, x, highest)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("kind", MATRICES)
def test_top_logits_are_exact_for_matrices_and_rows_with_large_rounding_errors(
    library: Native, kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    anyhow(monkeypatch)
    screen, x = made(library, MATRICES[kind](random(2500, 320))), random(rows, 320, seed=rows)
    x[:, 17] *= 200
    x[1:, 3] = 1e-20
    for highest in (1, 20):
        check(library, screen, x, highest)


def test_top_logits_are_exact_if_the_row_is_one_of_the_outputs(library: Native) -> None:
    """Then one logit is far above the others, and almost no panel is computed exactly."""
    weight = random(6000, 256)
    screen = made(library, weight)
    check(library, screen, weight[torch.arange(0, 6000, 500)] * 3, 1)


def test_lowered_or_ignored_outputs_do_not_displace_others(library: Native, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_nan_is_never_hidden(library: Native, bad: float) -> None:
    screen, x = made(library, random(3000, 256)), random(3, 256)
    x[1, 9] = bad
    found = screen.multiply(library, x, TopLogits([1] * 3, [NOTHING] * 3, 3000))
    assert found is None or not found[1].isfinite().any()
    weight = random(3000, 256)
    weight[1234, 7] = bad
    found = made(library, weight).multiply(library, random(3, 256), TopLogits([1] * 3, [NOTHING] * 3, 3000))
    assert found is None or not found[:, 1234].isfinite().any()


def test_if_all_panels_are_candidates_nothing_is_returned(library: Native) -> None:
    screen = made(library, random(1, 256).expand(3000, 256))
    assert screen.multiply(library, random(2, 256), TopLogits([1] * 2, [NOTHING] * 2, 3000)) is None
    assert made(library, random(3000, 256)).multiply(library, random(2, 256), TopLogits([2000] * 2, [NOTHING] * 2, 3000)) is None


def test_the_8_bit_copy_equals_int8(library: Native) -> None:
    weight = random(301, 200).bfloat16().float()
    screen = made(library, weight)
    found = unpack(screen.rough)[:, :200]
    assert (found - weight).abs().max() <= 3 / 253 * weight.abs().max()  # as tests of `linear` say of int8_dot
    lost_P = torch.nn.functional.pad((found - weight).norm(dim=-1), (0, 19)).view(-1, 32).amax(-1)
    assert (screen.norms[1] >= lost_P).all()
    assert (screen.norms[1] <= 1.2 * lost_P).all()  # what is lost of features that fill up the last group counts there too


def test_a_head_that_does_not_gain_backs_off(library: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ScreenedHead(made(library, random(3000, 256)))
    wanted, x = TopLogits([1], [NOTHING], 3000), random(1, 256)
    given: Tensor | None = None
    monkeypatch.setattr(Screen, "multiply", lambda *_: given)

    def steps(count: int) -> list[Tensor | None]:
        return [head.multiply(x, wanted) for _ in range(count) if head.begin_step()]

    assert len(steps(200)) == 9  # after 1, 2, 4, ... 64, 64 others
    given = x
    assert 1 <= len(steps(MAX_PAUSE + 1)) <= MAX_PAUSE
    assert len(steps(5)) == 5


def test_ids_beyond_the_matrix_are_ignored(library: Native) -> None:
    """A draft model may have a smaller vocabulary than its target."""
    weight = random(4000, 256)
    format = PackedFormat("bf16_dot", torch.bfloat16)
    tensors = format.prepare({"weight": weight})
    head = screened_head(format, tensors)
    assert head is not None
    x = weight[[2600, 3300]] * 2
    found = head.multiply(x, TopLogits([1, 1], [np.array([2600, 4000, 9999]), NOTHING], 5000))
    wanted = format.multiply(x, tensors, None)
    assert found is not None
    wanted[0, 2600] = found[0, 2600] = -torch.inf
    assert torch.equal(found.amax(-1), wanted.amax(-1))
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_a_nan_or_zero_norm_makes_its_panel_a_candidate(library: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    anyhow(monkeypatch)
    for bad in (torch.nan, torch.inf, 1e8, 3e38):
        weight = random(320, 256)
        weight[70, 3] = weight[70, 4] = bad
        screen = made(library, weight)
        assert screen.norms.isfinite().all(0).tolist() == [panel != 2 for panel in range(10)]
    for size in (1e-19, 1e-22, 1e-25, 1e-30, 1e-36):
        check(library, made(library, random(3000, 256)), random(40, 256, seed=3) * size, 1)
    weight = random(3000, 256)
    weight[1500, [5, 9]] = 3e38
    wanted = multiply(library, random(40, 256), made(library, weight).exact, None)
    found = made(library, weight).multiply(library, random(40, 256), TopLogits([1] * 40, [NOTHING] * 40, 3000))
    assert found is not None
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_rounding_of_the_exact_product_is_included_for_all_features(library: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 8,191 products is about half the resolution of a sum of 1: in one output all vanish, in another all are rounded up."""
    anyhow(monkeypatch)
    num_features, unit = 8192, 2.0**-8
    weight = torch.zeros(96, num_features)
    weight[:, 0] = 1
    weight[40, 1:] = 0.49 * 2.0**-23 / unit
    weight[80, 1:] = 0.51 * 2.0**-24 / unit * 2
    weight[80, 2000:] = 0
    x = torch.full((1, num_features), unit)
    x[0, 0] = 1
    for highest in (1, 2):
        check(library, made(library, weight), x, highest)
