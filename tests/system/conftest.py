"""What the system tests share: the demo model, made once and kept in the user's cache."""

import os
from pathlib import Path

import pytest

from serve.demo_model import DemoModelUnreachable, ensure_demo_model


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    try:
        return ensure_demo_model()
    except DemoModelUnreachable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no demo model here: {error}")
