"""Checkpoints that the tests of a rank share."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.engine.run.tiny_models import write_dense, write_moe


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory) -> Path:
    return write_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="session", params=["dense", "moe"])
def folder(request) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="session")
def oracle(folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def oracle_dense(dense_folder) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32).eval()
