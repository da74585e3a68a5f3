"""Every kernel compiles for Hopper, also where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOPPER_SHARED_BYTES = 227 * 1024
"""What one program may have there."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("options", "count"), [((), 80), pytest.param(("--all",), 150, marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_hopper_and_fits_it(options: tuple[str, ...], count: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.cuda.compile_kernels", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == count
    assert all(int(line.split()[3]) <= HOPPER_SHARED_BYTES for line in lines)
    of_bytes = [line for line in lines if line.startswith(("_expert", "_linear")) and int(line.split()[6]) > 0]
    assert not of_bytes, "numbers are loaded one by one, and none ahead"
    early = {line.split()[0] for line in lines if int(line.split()[10]) > 0}
    assert early == {"_few_rows_kernel", "_rms_norm_kernel"}, "others read what the launch before may still write"
    assert all(int(line.split()[13]) == 0 for line in lines), "nothing may be written yet"
