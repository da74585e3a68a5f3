import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=500, help="simulation: how many seeds")
    parser.addoption("--first-seed", type=int, default=0, help="simulation: the first of them")
