"""Plot the latency distributions. The only module of serve/ that imports matplotlib."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from serve.load.client import Answer
from serve.load.report import ttft_s


def draw(answers: Sequence[Answer], title: str, path: Path) -> None:
    """Write a plot; the suffix of ``path`` selects the format.

    Raises:
        ValueError: matplotlib is not installed, or does not know the suffix.
    """
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    begun = [answer for answer in answers if answer.token_s]
    series = {
        "to the first token": [ttft_s(answer) for answer in begun],
        "between tokens": [later - earlier for answer in begun for earlier, later in pairwise(answer.token_s)],
        "to the end": [answer.end_s - answer.due_s for answer in answers if answer.ending == "done"],
    }
    figure, axes = pyplot.subplots(1, len(series), figsize=(12, 3.6), layout="constrained")
    for axis, (name, values) in zip(axes, series.items(), strict=True):
        ordered = np.sort(values)
        axis.plot(ordered, np.arange(1, len(ordered) + 1) / max(len(ordered), 1))
        axis.set(title=name, xlabel="seconds", ylabel="part of all")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    try:
        figure.savefig(path)
    finally:
        pyplot.close(figure)
