"""The demo model, stored as GPTQ and AWQ store models: served like any other, it still knows the capital of France."""

from pathlib import Path
from typing import Any

import pytest
from manta_client import Client

from tests.model.quantise_checkpoint import AWQ, GPTQ, store_quantised
from tests.system.server import serving

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("config", [GPTQ, AWQ | {"group_size": 64}], ids=["gptq", "awq"])
def test_a_quantised_checkpoint_is_served_like_any_other(config: dict[str, Any], demo_folder: Path, tmp_path: Path) -> None:
    store_quantised(demo_folder, tmp_path / "stored", tmp_path / "plain", config)
    with serving(str(tmp_path / "stored"), "--name", "demo") as running, Client(running.grpc, timeout=120) as client:
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        said = client.chat.create(messages=asked, max_tokens=24, temperature=0).text
    assert "Paris" in said
