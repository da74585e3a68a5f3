"""Which Ray is meant."""

import pytest

from serve.config import ServeConfig
from serve.ray_address import address_of, watched_address


def config(address: str | None) -> ServeConfig:
    return ServeConfig.model_validate({"model": {"source": "x"}, "ray": {"address": address}})


@pytest.mark.parametrize(
    ("given", "environment", "meant"),
    [
        (None, {}, None),
        (None, {"RAY_ADDRESS": "head:6379"}, "auto"),
        (None, {"RAY_ADDRESS": ""}, None),
        ("local", {"RAY_ADDRESS": "head:6379"}, "local"),
        ("other:6379", {"RAY_ADDRESS": "head:6379"}, "other:6379"),
    ],
)
def test_an_onlooker_means_what_ray_was_told_rather_than_whatever_runs_here(
    given: str | None, environment: dict[str, str], meant: str | None
) -> None:
    assert watched_address(config(given), environment) == meant


def test_a_server_takes_a_ray_of_its_own_unless_it_is_a_job() -> None:
    assert address_of(config(None), {"RAY_ADDRESS": "head:6379"}) == "local"
    assert address_of(config(None), {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) == "auto"
