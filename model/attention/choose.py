"""Which attention backend a rank uses: chosen once, at the door."""

from typing import Literal

import torch

from model.attention.backend import AttentionBackend, AttentionConfig
from model.attention.cpu import CpuAttention
from model.attention.reference import ReferenceAttention

BackendName = Literal["auto", "reference", "cpu"]


def choose_backend(device: torch.device, config: AttentionConfig, name: BackendName = "auto") -> AttentionBackend:
    """The backend called ``name``; "auto" takes the fastest that runs on ``device``.

    Raises:
        ValueError: that backend does not run on this device.
    """
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "reference"
    if name == "reference":
        return ReferenceAttention(config)
    if device.type != "cpu":
        raise ValueError(f"the attention backend 'cpu' does not run on {device}; choose 'auto' or 'reference'")
    return CpuAttention(config)
