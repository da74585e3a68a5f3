"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example-{number}" for number in range(len(EXAMPLES))])
def test_an_example_runs(example: str, endpoint: str) -> None:
    command = [sys.executable, "-c", example]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={"MANTA_ENDPOINT": endpoint})
    assert (result.returncode, result.stderr) == (0, "")
    assert ("The sky is blue" in result.stdout) or "except" in example
