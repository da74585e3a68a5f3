"""The dtypes in which a model can be computed."""

import torch

from model import config

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in config.DTYPES}
"""By the names that config.json uses."""
