"""Which kernels are checked, and for how long."""

from collections.abc import Callable

from benchmarks.gpu.kernels.attention import decode, few, flashinfer, prefill
from benchmarks.gpu.kernels.checks import Checks
from benchmarks.gpu.kernels.elementwise import small
from benchmarks.gpu.kernels.experts import experts, routing
from benchmarks.gpu.kernels.products import rounded
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
    "experts": (0.6, experts),
    "routing": (0.3, routing),
    "sampling": (0.3, sampling),
    "undecided": (0.3, undecided),
    "edits": (0.3, edits),
}
"""With the minutes that each may take, compiling included. Each is a part of its own: one that loses the device loses none of the rest."""


def run(name: str, checks: Checks) -> None:
    """One of `CHECKS`. What is wrong in it does not keep the rest of it from being seen.

    Raises:
        AssertionError: what was wrong.
        OutOfTime: it took too long, and nothing was wrong up to there.
    """
    try:
        CHECKS[name][1](checks)
    except OutOfTime:
        if not checks.wrong:
            raise
    if checks.wrong:
        raise AssertionError("; ".join(checks.wrong))
