"""Which attention backend a rank uses: chosen once, at the door."""

from typing import Literal

import torch

from model.attention.backend import AttentionBackend, AttentionConfig
from model.attention.cpu import CpuAttention
from model.attention.native import NativeAttention
from model.attention.reference import ReferenceAttention
from parallel.native.library import HOW_TO_BUILD, native

BackendName = Literal["auto", "reference", "cpu", "native"]


def choose_backend(device: torch.device, config: AttentionConfig, name: BackendName = "auto") -> AttentionBackend:
    """The backend called ``name``; "auto" takes the fastest that runs on ``device``.

    Raises:
        ValueError: that backend does not run on this device.
    """
    library = native()
    suits = library is not None and config.head_dim % library.lanes == 0
    if name == "auto":
        name = ("native" if suits else "cpu") if device.type == "cpu" else "reference"
    if name == "reference":
        return ReferenceAttention(config)
    if device.type != "cpu":
        raise ValueError(f"the attention backend '{name}' does not run on {device}; choose 'auto' or 'reference'")
    if name == "native":
        if library is None:
            raise ValueError(f"the attention backend 'native' is not built; {HOW_TO_BUILD}, or choose 'auto'")
        if not suits:
            raise ValueError(f"the attention backend 'native' wants heads of a multiple of {library.lanes}, not {config.head_dim}")
        return NativeAttention(config, library)
    return CpuAttention(config)
