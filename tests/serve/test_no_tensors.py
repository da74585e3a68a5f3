"""Processes that hold no tensors do without torch: it takes a second of each start, and some 180 MB of memory."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["serve.deployment", "serve.structured.compiler_process"])
def test_fronts_replicas_and_grammar_compilers_do_not_load_torch(module: str) -> None:
    script = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
