"""A host's resources are limited by its container's."""

import os
from pathlib import Path

import psutil
import pytest
import torch

from engine.run.host_resources import available_memory_bytes, multiplies_bfloat16, usable_cores


def test_a_cpu_quota_bounds_the_cores(tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == usable_cores(tmp_path / "nowhere") <= len(os.sched_getaffinity(0))


def test_a_memory_limit_bounds_the_memory(tmp_path):
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    assert available_memory_bytes(tmp_path) == 3_000_000
    (tmp_path / "memory.current").write_text("6000000\n")
    assert available_memory_bytes(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_native_bfloat16_is_what_the_processor_reports():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), None)
    if flags is None:
        pytest.skip("this kernel lists no flags")
    assert multiplies_bfloat16(torch.device("cpu")) == ("avx512_bf16" in flags.split() or "amx_bf16" in flags.split())
