"""What the processes of a local Ray find in their environment."""

from pathlib import Path

import pytest

from serve.config import ServeConfig
from serve.local_ray import CONTROL_LOOP, FOR_NOBODY, _variables


def test_what_the_operator_says_of_ray_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert float(_variables(ServeConfig(), tmp_path)[CONTROL_LOOP]) > 0.1
    said = {CONTROL_LOOP: "0.05", **dict.fromkeys(FOR_NOBODY, "1")}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert said.items() <= _variables(ServeConfig(), tmp_path).items()


def test_with_rays_dashboard_its_processes_report_for_it(tmp_path: Path) -> None:
    assert FOR_NOBODY.items() <= _variables(ServeConfig(), tmp_path).items()
    with_dashboard = _variables(ServeConfig.model_validate({"ray": {"dashboard": True}}), tmp_path)
    assert not FOR_NOBODY.keys() & with_dashboard.keys()
