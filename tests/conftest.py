"""What must be so before anything else is imported."""

import logging
import os
from collections.abc import Iterator
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Beside another worker, threads that wait in a loop keep those from running for which they wait. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are checked by Triton's interpreter; triton reads this when it is imported

os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's own 15 its processes stand still beside any other work of the machine

# How long an example takes, and how fast examples are made, says how busy the machine is.
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# The same examples in every run, until the test itself changes: what fails then fails because of a change.
settings.register_profile("repeatable", derandomize=True, database=None, **UNTIMED)
# Others in every run, to look for more: --hypothesis-profile=random.
settings.register_profile("random", derandomize=False, print_blob=True, **UNTIMED)
settings.load_profile("repeatable")  # the option comes after it

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_log_goes_where_a_past_test_wanted_it() -> Iterator[None]:
    """A command that runs in a test sets up the log of the whole process, and its stderr is closed with the test."""
    level = logging.root.level
    yield
    logging.root.setLevel(level)
    for handler in [one for one in logging.root.handlers if type(one) is logging.StreamHandler]:  # pytest's own are of other classes
        logging.root.removeHandler(handler)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist there is no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from tests.work_units import FilesAndRay

    return FilesAndRay(config, log)
