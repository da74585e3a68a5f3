"""What the processes of a local Ray find in their environment."""

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from serve.config import ServeConfig
from serve.local_ray import CONTROL_LOOP, FOR_NOBODY, _folder_and_variables, _variables
from serve.rollout import StartError


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


def _started_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with ExitStack() as stack:
        return _folder_and_variables(ServeConfig(), stack)[0]


def test_a_folder_too_deep_for_sockets_is_told_with_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        assert _started_in(Path(short), monkeypatch).parent == Path(short)
        deep = Path(short, "a" * 60)
        deep.mkdir()
        with pytest.raises(StartError, match=r"bytes too long for Ray's sockets; set TMPDIR \(or ray.temp_dir\) to a shorter one"):
            _started_in(deep, monkeypatch)
        assert os.listdir(deep) == [], "nothing is left there"


def test_a_folder_that_cannot_be_made_is_told_with_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = ServeConfig.model_validate({"ray": {"temp_dir": str(tmp_path / "file" / "ray")}})
    with ExitStack() as stack, pytest.raises(StartError, match=r"Not a directory.*; set TMPDIR, or ray.temp_dir, to another folder"):
        _folder_and_variables(config, stack)
