"""What the system tests share: the demo model, made once and kept in the user's cache."""

from pathlib import Path

import pytest

from serve.demo_model import DemoModelError, ensure_demo_model


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    try:
        return ensure_demo_model()
    except DemoModelError as error:
        pytest.skip(f"no demo model here: {error}")
