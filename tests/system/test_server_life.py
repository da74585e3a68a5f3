"""`manta serve` killed without a chance to clean up."""

from pathlib import Path

import psutil
import pytest

from tests.system.server import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


def test_what_a_killed_server_had_started_ends_as_well(demo_folder: Path) -> None:
    with serving(str(demo_folder), "--name", "demo", "--tensor-parallel", "2") as server:
        family = server.descendants
        assert len(server.ranks()) == 2
        server.process.kill()
        server.process.wait(5)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
