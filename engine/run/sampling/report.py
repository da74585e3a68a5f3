"""The outcome of drawing a token for each row of a step."""

from typing import NamedTuple


class DrawReport(NamedTuple):
    """One entry per row in each list. Whatever is not a token is 0 or 1."""

    tokens: list[int]
    is_decided: list[int]
    """0: filters keep more ids than there were candidates (`engine.run.sampling.filters.draw_filtered`); the token is not valid."""
    raw_is_finite: list[int]
    """Whether the highest of the model's logits is finite."""
    is_finite: list[int]
    """Whether the highest logit is finite after the edits."""
