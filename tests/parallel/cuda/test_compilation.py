"""Every kernel compiles for every kind of GPU, without one being present, and fits its resources."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOPPER_SHARED_BYTES = 227 * 1024
"""Shared memory per program."""


def compiled(options: tuple[str, ...], folder: Path) -> list[str]:
    """The output of `tests.parallel.cuda.compile_kernels`, one line per kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.cuda.compile_kernels", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("capability", "count", "kib"), [(75, 94, 64), (80, 94, 163), (89, 108, 99), (100, 108, 227), (120, 108, 99)])
def test_default_tiles_fit_every_kind_of_device(capability: int, count: int, kib: int, tmp_path: Path) -> None:
    """Turing in float16, Ampere, Ada, Blackwell and consumer Blackwell; attention in float32 as well."""
    lines = compiled((str(capability),), tmp_path)
    assert len(lines) == count
    assert not [line for line in lines if int(line.split()[3]) > kib * 1024]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("options", "count"), [((), 93), pytest.param(("--all",), 227, marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_hopper_and_fits_it(options: tuple[str, ...], count: int, tmp_path: Path) -> None:
    lines = compiled(options, tmp_path)
    assert len(lines) == count
    assert all(int(line.split()[3]) <= HOPPER_SHARED_BYTES for line in lines)
    of_bytes = [line for line in lines if line.startswith(("_grouped_gemm", "_matmul", "swap_ab")) and int(line.split()[6]) > 0]
    assert not of_bytes, "numbers are loaded one by one, and none ahead"
    waiting = [line for line in lines if line.startswith(("_gemv", "_gated_gemv")) and int(line.split()[16]) > 4]
    assert not waiting, "weights go through shared memory: more barriers than for the sums of all threads at the end"
    early = {line.split()[0] for line in lines if int(line.split()[10]) > 0}
    assert early == {"_gemv_kernel", "_gated_gemv_kernel", "_rms_norm_kernel"}, "others read what the launch before may still write"
    assert all(int(line.split()[13]) == 0 for line in lines), "nothing may be written yet"
