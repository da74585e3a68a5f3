"""How far kernels may read past the last column of aligned rows."""

import torch

from parallel.aligned_rows import ALIGNMENT, empty_rows, readable_columns


def test_rows_are_aligned_and_readable_up_to_the_next_multiple() -> None:
    rows = empty_rows(3, 37, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (rows.shape, rows.stride()) == ((3, 37), (48, 1))
    assert [readable_columns(some) for some in (rows, rows[:1], rows[2:], rows[:0])] == [48] * 4
    assert readable_columns(empty_rows(3, 2 * ALIGNMENT, dtype=torch.float32, device=torch.device("cpu"))) == 2 * ALIGNMENT


def test_nothing_is_read_past_the_end_of_memory() -> None:
    assert readable_columns(torch.empty(3, 37)) == 37
    assert readable_columns(torch.empty(3, 48)[:, 5:42]) == 37, "the last row ends before the next unit"
    assert readable_columns(torch.empty(48 * 2 + 37).as_strided((3, 37), (48, 1))) == 37
    assert readable_columns(torch.empty(4, 41)[:3, :37]) == 37, "rows do not begin at whole units"
