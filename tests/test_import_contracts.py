"""The lists of modules in pyproject.toml's import contracts are complete."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_contract_of_the_control_plane_lists_all_of_engine_but_its_data_plane() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (listed,) = (contract["source_modules"] for contract in contracts if contract["name"] == "the control plane has no torch")
    modules = {f"engine.{path.stem}" for path in (ROOT / "engine").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(listed) == sorted(modules - {"engine.__init__", "engine.run"})
