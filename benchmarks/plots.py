"""Bar charts of a results table: each engine's median per workload, with the range over the rounds as error bars."""

import statistics
from pathlib import Path


def draw(results: list[dict], shape: str, form: str, path: Path) -> None:
    """Plot the results of one shape and weight format. The suffix of ``path`` selects the file format."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    chosen = [entry for entry in results if (entry["shape"], entry["format"]) == (shape, form)]
    engines = sorted({entry["engine"] for entry in chosen}, key=lambda name: (name != "manta", name))
    names = list(dict.fromkeys(cell["name"] for entry in chosen for cell in entry["cells"]))
    figure, axes = pyplot.subplots(1, len(names), figsize=(2.4 * len(names), 3.2), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for place, engine in enumerate(engines):
            rates = [c["tokens_per_s"] for entry in chosen if entry["engine"] == engine for c in entry["cells"] if c["name"] == name]
            if rates:
                middle = statistics.median(rates)
                axis.bar(place, middle, yerr=[[middle - min(rates)], [max(rates) - middle]], capsize=3, color=f"C{place}")
        axis.set(title=name, xticks=range(len(engines)), ylim=(0, None))
        axis.title.set_fontsize(9)
        axis.set_xticklabels(engines, rotation=35, ha="right", fontsize=8)
    axes[0][0].set_ylabel("tokens/s")
    figure.suptitle(f"{shape}, {form}: median of interleaved rounds, lines from the lowest to the highest", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
