"""The README's examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from manta_client.testing import FakeServer

README = Path(__file__).resolve().parents[1] / "README.md"
SOURCE = str(README.parent / "src")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 9


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example-{number}" for number in range(len(EXAMPLES))])
def test_an_example_runs(example: str) -> None:
    with FakeServer("The sky is blue") as server:
        run(example, server.endpoint)


def run(example: str, endpoint: str) -> None:
    command = [sys.executable, "-c", example]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={"MANTA_ENDPOINT": endpoint, "PYTHONPATH": SOURCE}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert ("The sky is blue" in result.stdout) or "except" in example


def test_what_is_not_run_is_python_too() -> None:
    shown = re.findall(r"^```python no-run\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert len(shown) == 2
    for example in shown:
        compile(example, "README.md", "exec")


def test_what_is_said_of_the_fixture_is_so(tmp_path: Path) -> None:
    """In a pytest of its own, as a user's."""
    shown = re.findall(r"^```python no-run\n(# conftest.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)[0]
    conftest, test = shown.split("# test_mine.py\n")
    (tmp_path / "conftest.py").write_text(conftest)
    program = """
def my_program(question):
    from manta_client import Client
    with Client() as client:
        return client.chat.create(messages=[{"role": "user", "content": question}], temperature=0).text

"""
    (tmp_path / "test_mine.py").write_text(program + test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env={"PYTHONPATH": SOURCE})
    assert result.returncode == 0, result.stdout
