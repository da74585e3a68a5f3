"""The kernel checks and their time limits."""

from collections.abc import Callable

from benchmarks.gpu.kernels.attention import decode, few, flashinfer, prefill
from benchmarks.gpu.kernels.checks import Checks
from benchmarks.gpu.kernels.elementwise import small
from benchmarks.gpu.kernels.experts import expert_tiles, experts, routing
from benchmarks.gpu.kernels.products import few_rows, gated, rounded
from benchmarks.gpu.kernels.sampling import edits, noise, sampling, undecided
from benchmarks.gpu.results import OutOfTime

CHECKS: dict[str, tuple[float, Callable[[Checks], None]]] = {
    "noise": (0.3, noise),
    "small": (0.3, small),
    "decode": (0.6, decode),
    "few": (0.5, few),
    "prefill": (0.4, prefill),
    "flashinfer": (0.4, flashinfer),
    "rounded": (0.7, rounded),
    "gemv": (1.0, few_rows),
    "gated gemv": (0.6, gated),
    "experts": (0.6, experts),
    "tiles": (1.2, expert_tiles),
    "routing": (0.3, routing),
    "sampling": (0.3, sampling),
    "undecided": (0.3, undecided),
    "edits": (0.3, edits),
}
"""Name to (time limit in minutes including compilation, check). Each check is its own part, so that one that loses the device does not stop
the others."""


def run(name: str, checks: Checks) -> None:
    """Run one of `CHECKS`. An error in it does not stop the rest of the check.

    Raises:
        AssertionError: all errors.
        OutOfTime: it took too long, without errors so far.
    """
    try:
        CHECKS[name][1](checks)
    except OutOfTime:
        if not checks.wrong:
            raise
    if checks.wrong:
        raise AssertionError("; ".join(checks.wrong))
