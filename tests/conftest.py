"""What must be so before anything else is imported."""

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels are checked by Triton's interpreter; triton reads this when it is imported

os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's own 15 its processes stand still beside any other work of the machine

# How long an example takes, and how fast examples are made, says how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
